"""mlx-lm's flags on our command line: each does what it says, or is refused in one line that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from conversations.templates import LLAMA3, NO_SYSTEM, PLAIN, QWEN3, write_tokenizer
from conversations.test_backends import write_model
from cross.test_door import adapter, code_folder  # noqa: F401 (a fixture)

import mlx_kvret
from mlx_kvret import api
from mlx_kvret.chat_template import Template
from mlx_kvret.cli import habits, main
from mlx_kvret.conversation import Transcript

ROOT = Path(__file__).parents[2]
FILLER = "the weary miller walks past a quiet river and the weary"
PROMPT = "remember Ada amber the weary miller walks past a quiet river and recall Ada"


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(backend):
    return mlx_kvret.load("demo", backend=backend)


def run(*arguments: Any, text: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=text)


def said(backend: str, *arguments: Any, prompt: str = PROMPT) -> str:
    given = ["generate", "--model", "demo", "--backend", backend, "--budget", 32, "-m", 6, "-p", prompt]
    result = run(*given, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


def refused(result: Result, *reasons: str, status: int = 1) -> None:
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    # transformers has a bar of its own
    line, lines = result.stderr.splitlines()[-1], result.stderr.count("error: ")
    assert line.startswith("error: ") and lines == 1 and all(r in line for r in reasons), result.stderr


def python(loaded: Any, **options: Any) -> str:
    """What the function says, as the oracle of the command."""
    ids = Transcript(loaded[1]).plan(FILLER).new
    return mlx_kvret.generate(*loaded, ids, **{"budget": 32, "max_tokens": 6} | options)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("only", [("--top-k", 1), ("--min-p", 1), ("--top-p", 0.001)])
def test_one_choice_is_the_likeliest(backend, only):
    drawn = said(backend, "--temp", 9, "--seed", 3)
    assert said(backend, "--temp", 9, "--seed", 3, *only) == said(backend) != drawn


DRAWN: dict[str, Any] = {
    "top_k": 5, "top_p": 0.5, "min_p": 0.2, "xtc_probability": 1.0, "xtc_threshold": 0.01,
    "repetition_penalty": 50.0, "repetition_context_size": 4, "min_tokens_to_keep": 9,
}  # fmt: skip
NEEDS: dict[str, Any] = {
    "min_tokens_to_keep": {"min_p": 0.9},
    "xtc_threshold": {"xtc_probability": 1.0},
    "xtc_probability": {"xtc_threshold": 0.01},
    "repetition_context_size": {"repetition_penalty": 50.0},
}


@pytest.mark.parametrize("name", DRAWN)
def test_flags_of_drawing_are_the_function_s_options(backend, loaded, name):
    options = {"temp": 2.0, "seed": 11, name: DRAWN[name], **NEEDS.get(name, {})}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    if "xtc_probability" in options:
        stops = api.backend_of(loaded[0]).stop_tokens(*loaded)
        lines = loaded[1].encode("\n", add_special_tokens=False)
        options["xtc_special_tokens"] = [*lines, *stops]
    answer = said(backend, *flags, prompt=FILLER)
    assert answer == python(loaded, **options)
    lost = [key for key in options if key == name or (name, key[:3]) == ("xtc_probability", "xtc")]
    assert answer != python(loaded, **{key: value for key, value in options.items() if key not in lost})


def test_a_bias_names_tokens_by_text_or_id(backend, loaded):
    mint = loaded[1].get_vocab()["mint"]
    for bias in ({"mint": 500}, {str(mint): 500.0}):
        assert said(backend, "--logit-bias", json.dumps(bias)).split() == ["mint"] * 6
    first = said(backend).split()[0]
    assert said(backend, "--logit-bias", json.dumps({first: -500})).split()[:1] != [first]


def test_tokens_that_end_an_answer_too(backend):
    forced = ["--logit-bias", '{"mint": 500}', "--verbose"]
    assert said(backend, *forced).split() == ["mint"] * 6
    for given in (["mint"], ["amber", "mint"]):
        # as many words as there are, until the next flag
        assert said(backend, "--extra-eos-token", *given, *forced) == ""
    chat = ["chat", "--model", "demo", "--backend", backend, "--budget", 32, "-m", 4, *forced[:-1]]
    result = run(*chat, "--extra-eos-token", "mint", text="recall Ada\n")
    assert result.exit_code == 0 and "mint" not in result.stdout
    assert "mint mint mint mint" in run(*chat, text="recall Ada\n").stdout


def test_what_is_read_at_a_time(backend, monkeypatch):
    calls, real = [], api.stream_generate

    def record(*given: Any, **options: Any) -> Any:
        calls.append(options["prefill_step_size"])
        return real(*given, **options)

    monkeypatch.setattr(api, "stream_generate", record)
    said(backend, "--prefill-step-size", 5)
    chat = ["chat", "--model", "demo", "--backend", backend, "--prefill-step-size", 7, "-m", 1]
    assert run(*chat, text="recall Ada\n").exit_code == 0
    assert calls == [5, 7]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--top-k", 3], "top_k has no effect with a temp of 0"),
        (["--min-p", 0.3], "min_p has no effect with a temp of 0"),
        (["--xtc-probability", 0.3], "xtc_probability has no effect with a temp of 0"),
        (["--temp", 1, "--min-tokens-to-keep", 3], "no effect without min_p"),
        (["--temp", 1, "--xtc-threshold", 0.3], "no effect without xtc_probability"),
        (["--repetition-context-size", 3], "no effect without repetition_penalty"),
        (["--temp", 1, "--top-k", -1], "top_k is -1"),
        (["--temp", 1, "--min-p", 1.5], "min_p is 1.5"),
        (["--temp", 1, "--xtc-probability", 1, "--xtc-threshold", 0.7], "xtc_threshold is 0.7"),
        (["--repetition-penalty", "nan"], "repetition_penalty is nan"),
        (["--logit-bias", "{"], "--logit-bias is no JSON"),
        (["--logit-bias", "[3]"], "--logit-bias is [3]; expected a JSON object"),
        (["--logit-bias", '{"mint": "high"}'], "is 'high'; expected a number"),
        (["--logit-bias", '{"no such word": 1}'], "not one; give a token's own text or its id"),
        (["--logit-bias", '{"999999": 1}'], "has no token 999999"),
        (["--extra-eos-token", "999999"], "has no token 999999"),
        (["--extra-eos-token", "recall Ada"], "is 2 tokens of this model, not one"),
        (["--prefill-step-size", 0], "--prefill-step-size is 0"),
        (["--num-draft-tokens", 2], "--num-draft-tokens has no effect without --draft-model"),
        (["--revision", "v2"], "revision v2 is of a hub repository"),
    ],
)
def test_what_cannot_work_is_one_line(flags, reason):
    refused(run("generate", "--model", "demo", "-p", PROMPT, *flags), reason)


def test_a_token_named_twice_is_refused():
    both = json.dumps({"mint": 1, str(mlx_kvret.load("demo", backend="mlx")[1].get_vocab()["mint"]): 2})
    refused(run("generate", "--model", "demo", "-p", PROMPT, "--logit-bias", both), "names a token twice")


# ---------------------------------------------------------------- prompts and templates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers with random weights, whose template each test writes."""
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture
def asked(folder, backend, monkeypatch):
    """Runs ``generate`` on a model with a template; the text that was read, and what was said."""
    fed, real = [], api.stream_generate

    def record(model: Any, tokenizer: Any, ids: Any, **options: Any) -> Any:
        fed.append(ids if isinstance(ids, str) else tokenizer.decode(ids))
        return real(model, tokenizer, ids, **options)

    monkeypatch.setattr(api, "stream_generate", record)

    def ask(template: str | None, *arguments: Any) -> tuple[str, Result]:
        fed.clear()
        write_tokenizer(folder, template)
        given = ["--model", folder, "--backend", backend, "--policy", "recent", "-m", 2, "-p", "Hi?"]
        result = run("generate", *given, *arguments)
        return "".join(fed), result

    ask.fed = fed
    return ask


OPENED = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"


def test_variables_of_the_template(asked):
    off = '{"enable_thinking": false}'
    assert asked(QWEN3)[0] == OPENED
    assert asked(QWEN3, "--chat-template-config", off)[0] == f"{OPENED}<think>\n\n</think>\n\n"
    assert asked(QWEN3, "--chat-template-config", '{"enable_thinking": true}')[0] == OPENED
    for template in (PLAIN, LLAMA3):
        refused(asked(template, "--chat-template-config", off)[1], "no variable 'enable_thinking'")
    for name in ("enable_thinkin", "messages", "add_generation_prompt", "tokenize", "chat_template"):
        result = asked(QWEN3, "--chat-template-config", json.dumps({name: False}))[1]
        refused(result, f"no variable '{name}'", "did you mean enable_thinking?" if "think" in name else "")
    refused(asked(QWEN3, "--chat-template-config", "off")[1], "--chat-template-config is no JSON")
    refused(asked(QWEN3, "--chat-template-config", "7")[1], "expected a JSON object")


def test_thinking_is_off_in_a_chat_too(folder, backend, asked):
    write_tokenizer(folder, QWEN3)
    talk = ["chat", "--model", folder, "--backend", backend, "--policy", "recent", "-m", 1]
    for flags, thought in (
        ((), ""),
        (("--chat-template-config", '{"enable_thinking": false}'), "<think>\n\n</think>\n\n"),
    ):
        asked.fed.clear()
        result = run(*talk, *flags, text="Hi?\n")
        assert result.exit_code == 0 and asked.fed == [OPENED + thought], result.output


def test_the_answer_begins_as_it_is_told_to(asked):
    fed, result = asked(QWEN3, "--prefill-response", "Sure, ")
    assert fed == f"{OPENED}Sure, " and result.stdout.startswith("Sure, ") and len(result.stdout) > 7
    both = ["--prefill-response", "Sure", "--chat-template-config", '{"enable_thinking": false}']
    assert asked(QWEN3, *both)[0] == f"{OPENED}<think>\n\n</think>\n\nSure"
    system = asked(PLAIN, "--system-prompt", "Be brief.", "--prefill-response", "Sure")[0]
    assert system == f"<|im_start|>system\nBe brief.<|im_end|>\n{OPENED}Sure"


@pytest.mark.parametrize("template", [PLAIN, QWEN3, LLAMA3], ids=["plain", "qwen3", "llama3"])
def test_a_told_beginning_and_the_rest_are_one_turn(folder, template):
    from transformers import AutoTokenizer

    stop = "<|eot_id|>" if template == LLAMA3 else "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder, template, stop))
    talk, end = Transcript(Template(tokenizer, answer="Sure, ")), tokenizer.convert_tokens_to_ids(stop)
    turn = talk.plan("Hi?")
    rest = tokenizer.encode("yes.", add_special_tokens=False)
    talk.account(turn, len(turn.new) + 5, [*rest, end], "Sure, yes.", True)
    read = tokenizer.decode([*talk.ids, *talk.plan("Why?").new])
    assert read.count(f"Sure, yes.{stop}") == 1 and read.endswith("Sure, ") and read.count("Sure, ") == 2
    assert talk.messages[-1] == {"role": "assistant", "content": "Sure, yes."}


def test_without_the_template(asked):
    assert asked(PLAIN, "--ignore-chat-template")[0] == asked(None)[0] == "Hi?"
    for flags in (
        ["--system-prompt", "Be brief."],
        ["--prefill-response", "Sure"],
        ["--chat-template-config", "{}"],
    ):
        ignored = asked(PLAIN, "--ignore-chat-template", *flags)[1]
        refused(ignored, f"{flags[0]} needs a chat template", "drop --ignore-chat-template")
        refused(asked(None, *flags)[1], f"{flags[0]} needs a chat template", "this model has none")
    refused(asked(NO_SYSTEM, "--system-prompt", "Be brief.")[1], "takes no system message")


def test_a_prompt_of_standard_input(backend):
    given = ["generate", "--model", "demo", "--backend", backend, "--budget", 32, "-m", 6]
    assert run(*given, "-p", "-", text=PROMPT).stdout == run(*given, "-p", PROMPT).stdout
    assert run(*given, "-p", "recall Ada", "--file", "-", text=PROMPT).exit_code == 0
    refused(run(*given, "-p", "-", "--file", "-", text=PROMPT), "both standard input")


# ---------------------------------------------------------------- what is loaded


def test_an_adapter(adapter):  # noqa: F811
    # nobody knows the gates of a model that an adapter has changed
    expected = python(mlx_kvret.load("demo", "demo", backend="mlx", adapter_path=adapter))
    plain = said("mlx", prompt=FILLER)
    assert said("mlx", "--gates", "demo", "--adapter-path", adapter, prompt=FILLER) == expected != plain
    given = ["generate", "--model", "demo", "--backend", "torch", "-p", PROMPT, "--adapter-path", adapter]
    refused(run(*given), "merge one of PEFT")


def test_code_of_a_folder_runs_only_if_that_is_said(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, ran = code_folder(tmp_path, backend)
    given = ["generate", "--model", path, "--backend", backend, "--policy", "recent", "-p", PROMPT, "-m", 2]
    result = run(*given)
    assert result.exit_code == 1 and "trust_remote_code" in result.stderr and not ran.exists()
    assert run(*given, "--trust-remote-code").exit_code == 0 and ran.exists()


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_what_is_loaded_is_loaded_as_said(command, monkeypatch):
    given = [command, "--model", "demo", *(["-p", PROMPT] if command == "generate" else [])]
    refused(run(*given, "--backend", "torch", "--compile"), "compile=True compiles recorded steps")
    refused(run(*given, "--backend", "mlx", "--compile"), "compile", "it is of torch")
    refused(run(*given, "--backend", "torch", "--adapter-path", "there"), "merge one of PEFT")
    asked = {}

    def load(model, gates, **options):
        asked.update(options)
        raise mlx_kvret.errors.ConfigError("seen")

    monkeypatch.setattr(api, "load", load)
    more = [
        "--revision",
        "r",
        "--trust-remote-code",
        "--adapter-path",
        "a",
        "--compile",
        "--backend",
        "torch",
    ]
    refused(run(*given, *more), "seen")
    assert asked == {
        "backend": "torch", "revision": "r", "trust_remote_code": True, "adapter_path": "a", "compile": True,
    }  # fmt: skip


def test_a_draft_model(folder):
    for flags in ([], ["--num-draft-tokens", 1], ["--repetition-penalty", 2]):
        plain = said("mlx", *(flags if flags[:1] != ["--num-draft-tokens"] else []))
        assert said("mlx", "--draft-model", "demo", *flags) == plain
    given = ["generate", "--model", "demo", "-p", PROMPT]
    refused(run(*given, "--draft-model", "demo", "--backend", "torch"), "on MLX only", "assistant_model")
    draft = ["--draft-model", "demo", "--backend", "mlx", "--num-draft-tokens", 0]
    refused(run(*given, *draft), "--num-draft-tokens is 0")
    write_tokenizer(folder, PLAIN)
    refused(run(*given, "--backend", "mlx", "--draft-model", folder), "has other tokens than the model")


# ---------------------------------------------------------------- refused by name, and older names


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("flag", [*habits.REFUSED, "-qa"])
def test_flags_without_a_place_say_what_to_use(command, flag):
    name = "--quantize-activations" if flag == "-qa" else flag
    switch = name in ("--use-default-chat-template", "--quantize-activations", "--pipeline")
    # before anything else that may be wrong with the line
    for rest in ([], ["--model", "demo", "--budget", "0"]):
        result = run(command, *rest, flag, *([] if switch else ["8"]))
        refused(result, f"{name} of mlx-lm has no place here", habits.REFUSED[name][:40], status=2)


def test_several_values_of_a_flag_without_a_place():
    refused(
        run("generate", "--model", "demo", "--prompt", "x", "--image", "a.png", "b.png"),
        "cannot read 'a.png'",
    )


def test_older_names_work_and_say_what_they_are_called_now(asked):
    for old, new in (
        (["--system", "Be brief."], ["--system-prompt", "Be brief."]),
        (["--raw"], ["--ignore-chat-template"]),
        (["--chunk", 3], ["--prefill-step-size", 3]),
        (["--stats"], ["--verbose"]),
    ):
        once, now = asked(PLAIN, *old), asked(PLAIN, *new)
        assert once[0] == now[0] and once[1].stdout == now[1].stdout and now[1].exit_code == 0
        hint = f"note: {old[0]} is called {new[0]} now, as in mlx-lm; {old[0]} will go"
        assert once[1].stderr.splitlines()[:1] == [hint] and "note:" not in now[1].stderr
        assert habits.RENAMED[old[0]] == new[0]
        refused(asked(PLAIN, *old, *new)[1], f"{old[0]} is the older name of {new[0]}", status=2)
    chat = run("chat", "--model", "demo", "--system", "the", "--budget", 32, text="recall Ada\n")
    assert chat.exit_code == 0 and chat.stderr.startswith("note: --system is called --system-prompt now")


@pytest.mark.parametrize(("value", "lines"), [("true", 1), ("T", 1), ("false", 0), ("f", 0), (None, 1)])
def test_figures_are_shown_if_asked_for(value, lines):
    result = run("generate", "--model", "demo", "--verbose", *([value] if value else []), "-p", "recall Ada")
    assert result.exit_code == 0 and result.stderr.count("prompt tokens at") == lines


# ---------------------------------------------------------------- the page
