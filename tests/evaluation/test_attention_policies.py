"""Selection of many texts at once against the policy core, text by text."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_near

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import select as core_select
from mlx_kvret.core.policies import keydiff_score, knorm_score, random_score
from mlx_kvret.core.retention import retention_score
from mlx_kvret.evaluation.methods import parse_method

torch = pytest.importorskip("torch")
from mlx_kvret.evaluation.attention_policies import Entries, evict, score  # noqa: E402

LAYERS, HEADS = 2, 3


def entries(rng, texts, count, seen):
    """A layer with random holes; keys of width 4."""
    position = np.sort(np.stack([rng.permutation(seen)[:count] for _ in range(texts * HEADS)]), axis=1)
    shape = (texts, HEADS, count)
    return Entries(
        torch.from_numpy(rng.normal(size=(*shape, 4)).astype(np.float32)),
        torch.from_numpy(rng.normal(size=(*shape, 4)).astype(np.float32)),
        torch.from_numpy((-rng.choice([0.0, 1e-6, 0.1, 0.1, np.inf], size=shape)).astype(np.float32)),
        torch.from_numpy(position.reshape(shape)),
        torch.from_numpy(rng.choice([0.0, 1.0, 2.0, np.nan], size=shape).astype(np.float32)),
        torch.from_numpy(rng.random(shape) < 0.8),
    )


def flat(layers, text, name):
    return np.concatenate([getattr(e, name)[text][e.valid[text]].numpy() for e in layers])


CONFIGS = st.builds(
    lambda scope, budget, buffer, least, sinks, window, threshold: EvictionConfig(
        budget,
        buffer,
        scope,
        min_per_head=min(least, budget),
        sinks=min(sinks, budget // 2),
        window=min(window, budget // 2),
        threshold=threshold,
    ),
    st.sampled_from(["global", "layer", "head"]),
    *(st.integers(low, high) for low, high in ((1, 8), (0, 3), (0, 2), (0, 3), (0, 3))),
    st.sampled_from([None, None, 0.5]),
)


@settings(max_examples=120, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 2**31), policy=st.sampled_from(["learned", "h2o"]))
def test_evict_keeps_what_the_core_keeps(config, seed, policy):
    rng, seen = np.random.default_rng(seed), 24
    layers = [entries(rng, 3, count, seen) for count in rng.integers(1, 13, size=LAYERS)]
    unmarked = torch.zeros(3, seen, dtype=torch.bool)
    left = evict(layers, parse_method(policy), config, seen, unmarked, unmarked)
    for text in range(3):
        position = flat(layers, text, "position")
        counts = [int(n) for e in layers for n in e.valid[text].sum(1)]
        head = np.repeat(np.arange(LAYERS * HEADS), counts)
        scores = (
            retention_score(flat(layers, text, "log_beta"), position, seen)
            if policy == "learned"
            else flat(layers, text, "attention")
        )
        kept = core_select(scores, position, head, seen, config, LAYERS, HEADS)
        assert flat(left, text, "position").tolist() == position[kept].tolist()
        assert [int(n) for e in left for n in e.valid[text].sum(1)] == np.bincount(
            head[kept], minlength=LAYERS * HEADS
        ).tolist()
        # keys move with their entries
        assert np.array_equal(flat(left, text, "keys"), flat(layers, text, "keys")[kept])


def test_scores_are_those_of_the_core():
    rng, seen = np.random.default_rng(0), 40
    layer = entries(rng, 2, 20, seen)
    head = torch.arange(HEADS)[None, :, None]
    useful = torch.zeros(2, seen, dtype=torch.bool)
    useful[1, 7] = True

    def scored(text, **options):
        name = ":".join([text, ",".join(f"{k}={v}" for k, v in options.items())]).rstrip(":")
        method = parse_method(name)
        return score(layer, method, method.eviction(8, 0), seen, useful, head)[1]

    keys, position = layer.keys[1].numpy(), layer.position[1].numpy()
    valid = layer.valid[1].numpy()
    np.testing.assert_allclose(scored("knorm")[valid], knorm_score(keys[valid]), rtol=1e-6)
    heads = np.broadcast_to(np.arange(HEADS)[:, None], valid.shape)[valid]
    assert_near(scored("keydiff")[valid], keydiff_score(keys[valid], heads, HEADS), 32, 1)
    drawn = random_score(position, np.arange(HEADS)[:, None], 3)
    assert np.array_equal(scored("random", policy_seed=3).numpy(), drawn)
    ahead = retention_score(layer.log_beta[1].numpy(), position, seen, 8)
    # age·log β and the log of a sum, which may cancel
    age = (seen + 1 - position) * np.abs(layer.log_beta[1].numpy())
    assert_near(scored("learned", lookahead=8), ahead, 16, age + math.log(8))
    oracle = scored("oracle")
    assert torch.equal(oracle > seen, layer.position[1] == 7)
    assert torch.equal(scored("recent"), layer.position[1].float())
