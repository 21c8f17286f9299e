"""Several prompts at once: each answer is what it would be alone, on both backends."""

import pytest

import mlx_kvret
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

PROMPTS = [
    "remember Anna amber then Rosa told Ivan copper recall Anna",
    "recall Stella",
    "remember Frank silver " * 40 + "recall Frank",
    "remember Ivan copper then remember Anna amber recall Ivan",
]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def loaded(request):
    return mlx_kvret.load("demo", backend=request.param)


def alone(loaded, budget, tokens, **options):
    return [
        mlx_kvret.generate(*loaded, prompt, budget=own, max_tokens=most, prefill_step_size=16, **options)
        for prompt, own, most in zip(PROMPTS, budget, tokens, strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_row_is_answered_as_it_would_be_alone(loaded, rows):
    budget, tokens = [16, 8, 32, 12], [9, 4, 12, 1]
    found = mlx_kvret.generate_batch(
        *loaded, PROMPTS, budget=budget, max_tokens=tokens, rows=rows, prefill_step_size=16
    )
    assert found == alone(loaded, budget, tokens)


def test_rows_draw_tokens_of_their_own(loaded):
    given = {"budget": 16, "max_tokens": 12, "temp": 3.0}
    found = mlx_kvret.generate_batch(*loaded, PROMPTS[:3], seed=[5, 6, 5], **given)
    expected = [
        mlx_kvret.generate(*loaded, prompt, seed=seed, **given)
        for prompt, seed in zip(PROMPTS[:3], [5, 6, 5], strict=True)
    ]
    assert found == expected
    same = mlx_kvret.generate_batch(*loaded, [PROMPTS[0]] * 3, seed=5, **given)
    assert same[0] == expected[0] and len(set(same)) == 3


def test_a_row_goes_on_by_itself(loaded):
    last = {r.index: r for r in mlx_kvret.stream_batch(*loaded, PROMPTS, budget=16, max_tokens=5) if r.cache}
    assert sorted(last) == [0, 1, 2, 3]
    for index, prompt in enumerate(PROMPTS):
        cache = mlx_kvret.make_cache(loaded[0], budget=16)
        list(mlx_kvret.stream_generate(*loaded, prompt, cache=cache, max_tokens=last[index].count))
        assert cache.seen == last[index].cache.seen
        for ours, theirs in zip(last[index].cache.kept_positions(), cache.kept_positions(), strict=True):
            assert [a.tolist() for a in ours] == [b.tolist() for b in theirs]
        more = [
            mlx_kvret.generate(*loaded, "recall Anna", cache=own, max_tokens=4)
            for own in (last[index].cache, cache)
        ]
        assert more[0] == more[1]


def test_caches_that_were_read_stay_as_they_are(loaded):
    model, tokenizer = loaded
    cache = mlx_kvret.make_cache(model, budget=16)
    mlx_kvret.generate(model, tokenizer, "remember Anna amber", cache=cache, max_tokens=1)
    seen, kept = cache.seen, [head.tolist() for layer in cache.kept_positions() for head in layer]
    caches = [cache.copy() for _ in range(3)]
    answers = mlx_kvret.generate_batch(model, tokenizer, ["recall Anna"] * 3, caches=caches, max_tokens=3)
    assert len(set(answers)) == 1
    assert cache.seen == seen
    assert [head.tolist() for layer in cache.kept_positions() for head in layer] == kept


def test_full_caches_stand_in_a_batch_or_are_refused(loaded):
    """On torch rows of full caches share one clock, so that they cannot join."""
    given = {"policy": "full", "max_tokens": 4, "prefill_step_size": 16}
    if mlx_kvret.api.backend_of(loaded[0]).__name__.startswith("mlx_kvret.cuda_backend"):
        with pytest.raises(UnsupportedFeatureError, match="policy 'full'"):
            mlx_kvret.generate_batch(*loaded, PROMPTS, **given)
        return
    last = {r.index: r for r in mlx_kvret.stream_batch(*loaded, PROMPTS, **given) if r.cache}
    alone = [mlx_kvret.generate(*loaded, prompt, **given) for prompt in PROMPTS]
    assert mlx_kvret.generate_batch(*loaded, PROMPTS, **given) == alone
    cache = last[1].cache
    assert cache.seen == last[1].prompt_tokens + last[1].count
    again = mlx_kvret.generate(*loaded, "recall Stella", cache=cache, max_tokens=2)
    assert isinstance(again, str)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ("recall Anna", {}, "expected a list of prompts"),
        ([], {}, "empty list"),
        (["recall Anna"], {"budget": [8, 8]}, "budget has 2 values, there are 1 prompts"),
        (["recall Anna"] * 2, {"seed": [1], "temp": 1.0}, "seed has 1 values"),
        (["recall Anna"], {"max_tokens": 0}, "max_tokens"),
        (["recall Anna"], {"rows": 0}, "rows"),
        (["recall Anna"], {"bugdet": 8}, "budget"),
        (["recall Anna"], {"seed": 3}, "no effect"),
    ],
)
def test_refusals(loaded, prompts, options, said):
    with pytest.raises(ConfigError, match=said):
        mlx_kvret.generate_batch(*loaded, prompts, **options)
