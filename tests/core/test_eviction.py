"""The selection against method.md written down as sorting of tuples, and its invariants along a stream."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.config import MOST_TOKENS, EvictionConfig
from mlx_kvret.core.eviction import due_groups, heads_per_group, protected, select
from mlx_kvret.core.policies import random_score
from mlx_kvret.core.retention import retention_score

SCOPES = ("global", "layer", "head")


def plainly(entries, seen, config, layers, kv_heads):
    """Kept entries of a list of (score, position, head), group by group and by sorting."""
    size = {"global": layers * kv_heads, "layer": kv_heads, "head": 1}[config.scope]

    def merit(entry):
        score, position, head = entry
        return -math.inf if math.isnan(score) else score, position, -head

    def safe(entry):
        return entry[1] < config.sinks or entry[1] >= seen - config.window

    kept = set()
    for first in range(0, layers * kv_heads, size):
        group = [e for e in entries if first <= e[2] < first + size]
        if config.policy == "full" or len(group) < (config.budget + config.buffer) * size:
            kept.update(e[1:] for e in group)
            continue
        stay = [e for e in group if safe(e)]
        for head in range(first, first + size):
            lacking = config.min_per_head - len([e for e in stay if e[2] == head])
            own = [e for e in group if e[2] == head and not safe(e)]
            stay += sorted(own, key=merit, reverse=True)[: max(lacking, 0)]
        rest = sorted((e for e in group if e not in stay), key=merit, reverse=True)
        rest = rest[: config.budget * size - len(stay)]
        if config.threshold is not None:
            rest = [e for e in rest if merit(e)[0] >= np.float32(math.log(config.threshold))]
        kept.update(e[1:] for e in stay + rest)
    return kept


def kept_by_select(entries, *args):
    score, position, head = np.array(entries, np.float64).reshape(-1, 3).T
    mask = select(score, position.astype(np.int32), head.astype(np.int32), *args)
    assert mask.shape == (len(entries),) and mask.dtype == bool
    return {entry[1:] for entry, stays in zip(entries, mask, strict=True) if stays}


@st.composite
def configs(draw, **fixed):
    budget = draw(st.integers(1, 5))
    sinks = draw(st.integers(0, budget))
    options = {
        "buffer": draw(st.integers(0, 3)),
        "scope": draw(st.sampled_from(SCOPES)),
        "min_per_head": draw(st.integers(0, budget)),
        "sinks": sinks,
        "window": draw(st.integers(0, budget - sinks)),
        "threshold": draw(st.none() | st.floats(1e-3, 1)),
    }
    return EvictionConfig(budget, **(options | fixed))


# few values, so that ties are common
scores = st.sampled_from([math.nan, -math.inf, -3.0, -1.0, -0.5, -0.0, 0.0]) | st.floats(-9, 0, width=32)


@st.composite
def caches(draw):
    """Entries in any order, ragged and with empty heads, after ``seen`` tokens."""
    layers, kv_heads, seen = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    places = [(position, head) for head in range(layers * kv_heads) for position in range(seen)]
    shuffled = draw(st.permutations(places))
    held = shuffled[: draw(st.integers(0, len(places)))]
    return [(draw(scores), *place) for place in held], seen, layers, kv_heads


@settings(max_examples=400, deadline=None)
@given(caches(), configs())
def test_select_is_the_sorted_rule(cache, config):
    entries, seen, layers, kv_heads = cache
    args = seen, config, layers, kv_heads
    assert kept_by_select(entries, *args) == plainly(entries, *args)


@settings(max_examples=100, deadline=None)
@given(caches(), configs(), st.randoms(use_true_random=False))
def test_order_of_entries_has_no_meaning(cache, config, random):
    entries, *shape = cache
    shuffled = random.sample(entries, len(entries))
    assert kept_by_select(entries, shape[0], config, *shape[1:]) == kept_by_select(
        shuffled, shape[0], config, *shape[1:]
    )


@st.composite
def streams(draw):
    """Chunk sizes and the log β of (tokens, L·H)."""
    chunks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    layers, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    log_beta = -np.random.default_rng(seed).exponential(0.05, (sum(chunks), layers * kv_heads))
    return chunks, log_beta.astype(np.float32), layers, kv_heads


def replay(chunks, score, config, layers, kv_heads):
    """Entries (position, head) after each forward pass; ``score(position, head, seen)``."""
    held, seen = np.zeros((0, 2), np.int64), 0
    for chunk in chunks:
        new = np.stack(np.meshgrid(np.arange(seen, seen + chunk), np.arange(layers * kv_heads)), -1)
        held, seen = np.concatenate([held, new.reshape(-1, 2)]), seen + chunk
        position, head = held.T
        held = held[select(score(position, head, seen), position, head, seen, config, layers, kv_heads)]
        yield seen, {(int(p), int(h)) for p, h in held}


@settings(max_examples=150, deadline=None)
@given(streams(), configs())
def test_invariants_along_a_stream(stream, config):
    chunks, log_beta, layers, kv_heads = stream
    size = heads_per_group(config, layers, kv_heads)
    before, last = set(), 0

    def score(position, head, seen):
        return retention_score(log_beta[position, head], position, seen, config.lookahead)

    for seen, held in replay(chunks, score, config, layers, kv_heads):
        heads = range(layers * kv_heads)
        offered = before | {(p, h) for p in range(last, seen) for h in heads}
        assert held <= offered, "nothing comes back"
        for first in range(0, layers * kv_heads, size):
            mine = {e for e in held if first <= e[1] < first + size}
            theirs = {e for e in offered if first <= e[1] < first + size}
            due = len(theirs) >= (config.budget + config.buffer) * size
            if not due:
                assert mine == theirs
            elif config.threshold is None:
                assert len(mine) == config.budget * size
            else:
                assert len(mine) <= config.budget * size
        positions = {h: {p for p, head in held if head == h} for h in heads}
        for h in heads:
            assert positions[h] >= set(range(min(config.sinks, seen)))
            assert positions[h] >= set(range(max(seen - config.window, 0), seen))
            assert len(positions[h]) >= min(config.min_per_head, len([e for e in offered if e[1] == h]))
        before, last = held, seen


@settings(max_examples=100, deadline=None)
@given(streams(), configs(buffer=0, window=0, threshold=None))
def test_fixed_scores_without_buffer_do_not_depend_on_chunks(stream, config):
    """The best of a stream are the best of its parts' best; ageing scores and windows have no such law."""
    chunks, _, layers, kv_heads = stream

    def score(position, head, seen):
        return random_score(position, head, seed=5)

    *_, last = replay(chunks, score, config, layers, kv_heads)
    *_, one_by_one = replay([1] * sum(chunks), score, config, layers, kv_heads)
    *_, at_once = replay([sum(chunks)], score, config, layers, kv_heads)
    assert last == one_by_one == at_once


def test_due_from_budget_and_buffer_on():
    def due(counts, scope, **options):
        return due_groups(np.array(counts), EvictionConfig(3, 1, scope, **options), 2, 2).tolist()

    assert due([4, 4, 4, 3], "global") == [False]
    assert due([4, 4, 4, 4], "global") == due([0, 16, 0, 0], "global") == [True]
    assert due([4, 3, 8, 0], "layer") == [False, True]
    assert due([4, 3, 8, 0], "head") == [True, False, True, False]
    assert due([90, 90, 90, 90], "layer", policy="full") == [False, False]


def test_budget_competes_over_the_scope():
    # two layers of two heads, three tokens each; the first layer's scores are the higher ones
    head, position = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    score = np.float32([-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12])

    def kept(scope):
        mask = select(score, position, head, 3, EvictionConfig(1, 0, scope), 2, 2)
        return [position[mask & (head == h)].tolist() for h in range(4)]

    assert kept("global") == [[0, 1, 2], [0], [], []]
    assert kept("layer") == [[0, 1], [], [0, 1], []]
    assert kept("head") == [[0], [0], [0], [0]]


def test_ties_go_to_the_newer_token_then_to_the_lower_head():
    head, position = np.array([2, 0, 1, 0, 1, 2]), np.array([1, 0, 1, 1, 0, 0])
    mask = select(np.zeros(6), position, head, 2, EvictionConfig(1, 0), 3, 1)
    assert mask.tolist() == [True, False, True, True, False, False]  # all of position 1
    # two high scores leave one place, for which position 1 of three heads ties
    score, head, position = (
        np.float32([-1, -1, -2, -2, -2]),
        np.array([1, 2, 2, 1, 0]),
        np.array([0, 0, 1, 1, 1]),
    )
    mask = select(score, position, head, 2, EvictionConfig(1, 0), 3, 1)
    assert mask.tolist() == [True, True, False, False, True]


def test_nothing_is_too_low_to_fill_the_budget():
    score = np.float32([np.nan, -np.inf, np.nan, -np.inf])
    mask = select(score, np.arange(4), np.zeros(4, int), 4, EvictionConfig(3, 0), 1, 1)
    assert mask.tolist() == [False, True, True, True]  # NaN and -inf tie, the newest three stay
    score[0] = -1e30
    assert select(score, np.arange(4), np.zeros(4, int), 4, EvictionConfig(1, 0), 1, 1).tolist() == [
        True, False, False, False,
    ]  # fmt: skip


def test_scores_are_compared_in_float32():
    score = np.array([-1.0, -1.0 - 1e-9])
    mask = select(score, np.array([0, 1]), np.zeros(2, int), 2, EvictionConfig(1, 0), 1, 1)
    assert mask.tolist() == [False, True]  # a tie, so the newer


def test_threshold_spares_what_is_protected():
    alpha = np.float32(math.log(0.5))
    score = np.array([-9, alpha, np.nextafter(alpha, np.float32(-9)), -9], np.float32)

    def kept(score, budget, **options):
        config = EvictionConfig(budget, 0, threshold=0.5, **options)
        return select(score, np.arange(4), np.zeros(4, int), 4, config, 1, 1).tolist()

    assert kept(score, 4) == [False, True, False, False]
    assert kept(score, 4, sinks=1) == [True, True, False, False]
    # where none is good enough, the head's own best makes two with the sink
    assert kept(2 * score, 4, sinks=1, min_per_head=2) == [True, True, False, False]
    assert kept(score, 5) == [True] * 4  # nothing is due
    assert kept(score * 0, 2) == [False, False, True, True]  # never more than the budget


def test_protection_follows_true_positions():
    config = EvictionConfig(8, 0, sinks=2, window=3)
    assert protected(np.array([0, 1, 2, 96, 97, 99]), 100, config).tolist() == [1, 1, 0, 0, 1, 1]
    assert protected(np.arange(2), 2, config).all()


def test_no_entries_and_one_token():
    none = np.zeros(0, np.int32)
    for scope in SCOPES:
        config = EvictionConfig(1, 0, scope, min_per_head=1, sinks=1)
        assert select(none, none, none, 0, config, 2, 3).shape == (0,)
        one = np.arange(6)
        assert select(np.zeros(6), one * 0, one, 1, config, 2, 3).all()


@pytest.mark.parametrize("budget", [100, MOST_TOKENS])
def test_a_budget_beyond_the_context_keeps_all(budget):
    entries = np.arange(20)
    assert select(-entries, entries, entries % 4, 20, EvictionConfig(budget, 0), 2, 2).all()


def test_arguments_stay_as_they_are():
    score, position, head = np.float32([np.nan, -1]), np.array([0, 1]), np.array([0, 0])
    select(score, position, head, 2, EvictionConfig(1, 0, min_per_head=1), 1, 1)
    assert np.isnan(score[0]) and position.tolist() == [0, 1] and head.tolist() == [0, 0]
