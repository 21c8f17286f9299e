"""Names and values of options, checked at the door."""

import math

import numpy as np
import pytest

from mlx_kvret.core.options import MAX_SEED, all_callable, check_known, nearest, number, short, whole
from mlx_kvret.core.request import Sampling, check_eviction, check_generation, check_max_tokens
from mlx_kvret.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("bugdet", r"'bugdet'; did you mean budget\?"),
        ("Budget", "did you mean budget"),
        ("lookahed", "did you mean lookahead"),
        ("policyseed", "did you mean policy_seed"),
        ("seed", "did you mean policy_seed"),
        ("zzz", "there are .*budget, buffer"),
    ],
)
def test_a_misspelt_option_names_the_nearest(given, says):
    with pytest.raises(ConfigError, match=f"a cache has no option .*{says}"):
        check_eviction({given: 1})


def test_an_option_of_another_place_says_why_not_here():
    with pytest.raises(ConfigError, match="load has no option lazy here: it is of mlx-lm"):
        check_known(["lazy"], ["device"], "load", {"lazy": "it is of mlx-lm"})
    assert nearest("lasy", ["device"], ["lazy"]) == "did you mean lazy?"


@pytest.mark.parametrize(
    "value", [True, None, 1.0, "3", 0, -1, 11, 10**30, -(10**5000), math.nan, [3]], ids=lambda v: "x"
)
def test_whole_numbers(value):
    with pytest.raises(ConfigError, match=r"n is .*; expected a whole number of at least 1 and at most 10"):
        whole("n", value, 1, 10)


@pytest.mark.parametrize(
    "value",
    [True, None, "1", math.nan, math.inf, -math.inf, -0.1, 1.1, 10**400, 1j, [0.5]],
    ids=lambda v: "x",
)
def test_numbers(value):
    with pytest.raises(ConfigError, match=r"x is .*; expected a share"):
        number("x", value, "a share", 0, 1)
    number("x", 0.5, "a share", 0, 1)


@pytest.mark.parametrize("value", [10**5000, [10**5000], "a" * 10**6, list(range(10**5))], ids=lambda v: "x")
def test_messages_stay_short(value):
    assert len(short(value)) < 100


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temp": math.nan}, "temp is nan"),
        ({"temp": -0.5}, "temp is -0.5"),
        ({"temp": math.inf}, "temp is inf"),
        ({"temp": True}, "temp is True"),
        ({"temp": "1"}, "temp is '1'"),
        ({"temp": 1e-300}, "temp is 1e-300"),
        ({"temp": 1.0, "top_p": 0}, "top_p is 0"),
        ({"temp": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temp": 1.0, "top_p": math.nan}, "top_p is nan"),
        ({"temp": 1.0, "seed": -1}, "seed is -1"),
        ({"temp": 1.0, "seed": 2**64}, "seed is 18446744073709551616"),
        ({"temp": 1.0, "seed": 1.0}, "seed is 1.0"),
        ({"temp": 1.0, "seed": True}, "seed is True"),
        ({"seed": 0}, "seed has no effect with a temp of 0"),
        ({"top_p": 0.5}, "top_p has no effect with a temp of 0"),
        ({"top_k": 3}, "top_k has no effect with a temp of 0"),
        ({"min_p": 0.1}, "min_p has no effect with a temp of 0"),
        ({"xtc_probability": 0.1}, "xtc_probability has no effect with a temp of 0"),
        ({"xtc_special_tokens": [3]}, "xtc_special_tokens has no effect with a temp of 0"),
        ({"temp": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temp": 1.0, "top_k": 2.0}, "top_k is 2.0"),
        ({"temp": 1.0, "min_p": math.nan}, "min_p is nan"),
        ({"temp": 1.0, "min_p": 1.1}, "min_p is 1.1"),
        ({"temp": 1.0, "min_p": 0.1, "min_tokens_to_keep": 0}, "min_tokens_to_keep is 0"),
        ({"temp": 1.0, "min_tokens_to_keep": 2}, "min_tokens_to_keep has no effect without min_p"),
        ({"temp": 1.0, "xtc_probability": 2}, "xtc_probability is 2"),
        ({"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.6}, "xtc_threshold is 0.6"),
        ({"temp": 1.0, "xtc_threshold": 0.2}, "xtc_threshold has no effect without xtc_probability"),
        ({"temp": 1.0, "xtc_probability": 1, "xtc_special_tokens": 3}, "xtc_special_tokens is 3"),
        ({"temp": 1.0, "xtc_probability": 1, "xtc_special_tokens": [-1]}, "special_tokens holds -1"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]; expected a dictionary"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias holds '3' where a token id should be"),
        ({"logit_bias": {True: 1.0}}, "logit_bias holds True"),
        ({"logit_bias": {3: "x"}}, "the logit_bias of token 3 is 'x'"),
        ({"logit_bias": {3: math.inf}}, "the logit_bias of token 3 is inf"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty is 1e-09"),
        ({"repetition_penalty": False}, "repetition_penalty is False"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"repetition_penalty": 1.1, "repetition_context_size": 0}, "repetition_context_size is 0"),
        ({"presence_context_size": 5}, "presence_context_size has no effect without presence_penalty"),
    ],
)
def test_sampling_that_cannot_work(options, says):
    with pytest.raises(ConfigError, match=says):
        Sampling(**options)


def test_sampling_that_works():
    assert not Sampling().asked and not Sampling(0.0, 1.0).asked
    assert Sampling(0.7, 0.9, MAX_SEED).asked and Sampling(1e-30).asked
    # penalties do not draw: they go with any sampler, and with the likeliest token
    changes = Sampling(logit_bias={3: -1}, repetition_penalty=1.3, presence_penalty=0, frequency_penalty=-1)
    assert not changes.asked
    assert list(changes.penalties()) == [("repetition", 1.3, 20), ("frequency", -1.0, 20)]
    check_generation({"sampler": print}, changes)
    changes.check_vocabulary(4)
    with pytest.raises(ConfigError, match="logit_bias holds token id 3, the model's are 0 to 2"):
        changes.check_vocabulary(3)


@pytest.mark.parametrize("value", [0, -2, 1.0, "3", True, None, math.nan, np.float32(3)])
def test_max_tokens(value):
    with pytest.raises(ConfigError, match=r"max_tokens is .*expected a whole number"):
        check_max_tokens(value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"prefill_step_size": -4}, "prefill_step_size is -4"),
        ({"prefill_step_size": 2.0}, "prefill_step_size is 2.0"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"sampler": 3}, "sampler is 3; expected a function"),
        ({"prompt_progress_callback": "print"}, "prompt_progress_callback is 'print'"),
        ({"logits_processors": print}, "logits_processors is .*expected a list of functions"),
        ({"logits_processors": [3]}, "expected a list of functions"),
    ],
)
def test_options_of_a_generation(options, says):
    with pytest.raises(ConfigError, match=says):
        check_generation(options, Sampling())


def test_a_sampler_decides_alone():
    check_generation({"sampler": print}, Sampling())
    with pytest.raises(ConfigError, match="sampler decides alone"):
        check_generation({"sampler": print}, Sampling(0.7))
    all_callable("logits_processors", (print,))
