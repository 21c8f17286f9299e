"""mlx-lm's batches on bounded rows: every row says and keeps what it would alone."""

import copy

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_cache
from tiny import forward, gated, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.errors import CacheError, ConfigError, ModelMismatchError, UnsupportedFeatureError

CHUNK, ANSWER = 16, 12
LENGTHS = [30, 7, 55, 1, 19, 40]
BUDGETS = [9, 12, 5, 9, 20, 9]


def make(model, budget, **options):
    return mlx_kvret.make_cache(model, budget=budget, buffer=4, **options)


def kept(model, cache):
    found = mlx_kvret.mlx_backend.hooks.checked_cache(model, cache)
    return [[head.tolist() for head in layer] for layer in found.kept_positions()]


def alone(model, tokens, budget, count=ANSWER):
    """The answer, and what is kept of the prompt and it."""
    cache = make(model, budget)
    steps = generate_step(
        mx.array(tokens), model, prompt_cache=cache, max_tokens=count, prefill_step_size=CHUNK
    )
    answer = [int(token) for token, _ in steps]
    cache = make(model, budget)
    for start in range(0, len(tokens) - 1, CHUNK):
        forward(model, tokens[start : min(start + CHUNK, len(tokens) - 1)], cache)
    for token in [tokens[-1], *answer]:
        forward(model, [token], cache)
    return answer, kept(model, cache)


def generated(batches, uids, late=()):
    """Tokens and caches by uid; ``late`` prompts come one by one while others are generated."""
    told, done, late = {}, {}, list(late)
    while len(done) < len(uids) + len(late) or late:
        if late:
            uids += late.pop(0)()
        for response in batches.next_generated():
            told.setdefault(response.uid, []).append(response.token)
            if response.finish_reason:
                done[response.uid] = response.prompt_cache
        if not late and len(done) == len(uids):
            break
    return told, done


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "qwen3_next", "gpt_oss"])
def test_rows_that_come_late_and_leave_early_are_as_alone(name):
    model = gated(name)
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    batches = BatchGenerator(
        model, prefill_step_size=CHUNK, prefill_batch_size=2, completion_batch_size=3, max_tokens=ANSWER
    )
    caches = [make(model, budget) for budget in BUDGETS]
    uids = batches.insert(prompts[:3], [ANSWER, 3, ANSWER], caches=caches[:3])
    late = [lambda i=i: batches.insert([prompts[i]], [ANSWER], caches=[caches[i]]) for i in range(3, 6)]
    told, done = generated(batches, uids, late)
    for uid, tokens, budget in zip(uids, prompts, BUDGETS, strict=True):
        answer, entries = alone(model, tokens, budget, len(told[uid]))
        assert told[uid] == answer
        assert kept(model, done[uid]) == entries
    assert all(cache.seen == 0 for cache in caches)


def test_batch_generate_goes_on_from_caches_and_gives_them_back(tmp_path):
    model = gated()
    model = mlx_kvret.attach(model, random_gates(shape_of(model)), budget=9, buffer=4)
    texts = [prompt(length, seed=length) for length in (30, 12)]
    caches = [make(model, 9), make(model, 6)]
    for text, cache in zip(texts, caches, strict=True):
        forward(model, text, cache)
    tokenizer = type("Words", (), {"eos_token_ids": [], "decode": lambda self, ids: str(ids)})()
    options = {"max_tokens": 5, "return_prompt_caches": True, "return_token_ids": True}
    found = mlx_lm.batch_generate(model, tokenizer, [[1, 2], [3]], prompt_caches=caches, **options)
    for text, more, cache, own, told in zip(
        texts, [[1, 2], [3]], found.caches, caches, found.token_ids, strict=True
    ):
        assert own.seen == len(text), "what was given is not touched"
        expected = [r.token for r in mlx_kvret.stream_generate(model, None, more, cache=own, max_tokens=5)]
        assert told == expected and kept(model, cache) == kept(model, own)
        # an extracted row is a cache as any other
        ours, theirs = tmp_path / "ours.safetensors", str(tmp_path / "theirs.safetensors")
        mlx_kvret.save_cache(model, cache, ours)
        mlx_cache.save_prompt_cache(theirs, cache)
        loaded = mlx_cache.load_prompt_cache(theirs)
        logits = forward(model, [5], own)
        np.testing.assert_allclose(
            forward(model, [5], mlx_kvret.load_cache(model, ours)[0]), logits, atol=1e-5
        )
        np.testing.assert_allclose(forward(model, [5], loaded), logits, atol=1e-5)
        np.testing.assert_allclose(forward(model, [5], copy.deepcopy(cache)), logits, atol=1e-5)
    chunks = {"prefill_step_size": CHUNK, "return_token_ids": True}
    stock = mlx_lm.batch_generate(model, tokenizer, texts, max_tokens=3, **chunks)
    for text, told in zip(texts, stock.token_ids, strict=True):
        assert told == alone(model, text, 9, 3)[0]


def test_what_cannot_stand_in_one_batch_is_refused_by_name():
    model = gated()
    with pytest.raises(UnsupportedFeatureError, match="policy 'recent'"):
        make(model, 9).extend(make(model, 9, policy="recent"))
    with pytest.raises(UnsupportedFeatureError, match="scope 'head'"):
        make(model, 9).extend(make(model, 9, scope="head"))
    with pytest.raises(ModelMismatchError, match="another model"):
        make(model, 9).extend(make(gated(seed=1), 9))
    with pytest.raises(UnsupportedFeatureError, match="evicts nothing"):
        make(model, 9).extend(mlx_kvret.make_cache(model, policy="full"))
    batches = BatchGenerator(model)
    batches.insert([[1, 2], [3, 4]], caches=[make(model, 9), mlx_kvret.make_cache(model, policy="full")])
    with pytest.raises(UnsupportedFeatureError, match="bounded and of full"):
        batches.next()
    for name, why in (("deepseek_v3", "latent attention"), ("falcon_h1", "keep a state")):
        other = gated(name)
        batches = BatchGenerator(other)
        batches.insert([[1, 2], [3, 4]], caches=[make(other, 9), make(other, 9)])
        with pytest.raises(UnsupportedFeatureError, match=why):
            batches.next()
        with pytest.raises(UnsupportedFeatureError, match="one sequence only"):
            make(other, 9).extend(make(other, 9))
    both = make(model, 9)
    both.extend(make(model, 9))
    for wrong in ([2], [-1]):
        with pytest.raises(ConfigError, match="count from 0"):
            both.filter(wrong)
    with pytest.raises(CacheError, match=r"row\(i\)"):
        mlx_kvret.generate(model, None, [1], cache=both)
    with pytest.raises(CacheError, match="lengths for 2 rows"):
        both.prepare([1, 2, 3])
    with pytest.raises(UnsupportedFeatureError, match="batch of 3"):
        model(mx.zeros((3, 1), mx.int32), cache=both)


def test_a_pass_that_is_broken_off_changes_no_row(monkeypatch):
    model = gated()
    batch = make(model, 9)
    forward(model, prompt(20), batch)
    idle = batch.copy()
    batch.extend(make(model, 6))
    tokens = mx.array([[1, 2, 3], [4, 5, 0]])

    def fail(self, x):
        raise KeyboardInterrupt

    before = [batch.kept_positions(row) for row in range(2)]
    last = model.model.layers[-1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(type(last), "__call__", lambda self, x: fail(self, x) if self is last else x)
        batch.prepare([3, 2])
        with pytest.raises(KeyboardInterrupt):
            model(tokens, cache=batch)
    for row in range(2):
        for ours, theirs in zip(batch.kept_positions(row), before[row], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    fresh = make(model, 9)
    forward(model, prompt(20), fresh)
    expected = forward(model, [1, 2, 3], fresh)
    logits = np.array(model(tokens, cache=batch))
    batch.finalize()
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    np.testing.assert_allclose(logits[1, :2], forward(model, [4, 5], make(model, 6)), atol=1e-5)
    np.testing.assert_allclose(forward(model, [1, 2, 3], idle), expected, atol=1e-5)


def test_nan_of_one_row_stays_there():
    """Rows stand side by side in arrays: none may see what another's padding is."""
    model = gated()
    batch = make(model, 9)
    forward(model, prompt(30), batch)
    sick = make(model, 9)
    forward(model, prompt(30, seed=2), sick)
    sick.settle()
    arena = sick.shared.arena
    for held in (arena.recent.keys, arena.recent.values):
        held[:] = [None if array is None else array * mx.nan for array in held]
    arena.pool.keys, arena.pool.values = arena.pool.keys * mx.nan, arena.pool.values * mx.nan
    batch.extend(sick)
    batch.extend(make(model, 3))
    own = batch.row(0)
    for token in range(20):
        logits = np.array(model(mx.array([[token]] * 3), cache=batch))
        assert np.isnan(logits[1]).all() and not np.isnan(logits[[0, 2]]).any()
        np.testing.assert_allclose(logits[0], forward(model, [token], own), atol=1e-5)
    batch.filter([0, 2])
    batch.extend(make(model, 3))  # in the slab that was the sick row's
    for token in range(9):
        assert not np.isnan(np.array(model(mx.array([[token]] * 3), cache=batch))).any()


def test_without_attaching_mlx_lm_batches_as_ever():
    model = tiny()
    batches = BatchGenerator(model, max_tokens=3)
    batches.insert([[1, 2, 3], [4, 5]])
    before = [r.token for _ in range(3) for r in batches.next_generated()]
    mlx_kvret.detach(mlx_kvret.attach(model))
    batches = BatchGenerator(model, max_tokens=3)
    batches.insert([[1, 2, 3], [4, 5]])
    assert [r.token for _ in range(3) for r in batches.next_generated()] == before
