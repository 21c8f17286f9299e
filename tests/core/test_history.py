"""What went when, beside lists of everything that was kept at every moment."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.detokenizer import token_texts
from mlx_kvret.core.history import KEPT, History, described
from mlx_kvret.errors import ConfigError


class Cache:
    """A cache that loses what a test says."""

    def __init__(self, layers, kv_heads):
        self.layers, self.kv_heads = layers, kv_heads
        self.seen = 0
        self.sets = [set() for _ in range(layers * kv_heads)]
        self.looks = 0

    def read(self, tokens, loses=()):
        for held in self.sets:
            held.update(range(self.seen, self.seen + tokens))
        self.seen += tokens
        for head, position in loses:
            self.sets[head % len(self.sets)].discard(position % self.seen)

    def take_back(self, count):
        self.seen -= count
        self.sets = [{p for p in held if p < self.seen} for held in self.sets]

    @property
    def entries(self):
        return sum(map(len, self.sets))

    @property
    def nbytes(self):
        return 100 * self.entries

    def kept_positions(self):
        self.looks += 1
        flat = [np.array(sorted(held), np.int64) for held in self.sets]
        return [flat[i : i + self.kv_heads] for i in range(0, len(flat), self.kv_heads)]


losses = st.lists(st.integers(0, 245), max_size=6).map(lambda drawn: [divmod(one, 41) for one in drawn])
steps = st.lists(st.tuples(st.integers(0, 6), losses, st.integers(0, 2)), max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 3), st.integers(1, 2), steps, st.integers(0, 5))
def test_as_lists_of_all_that_was_kept(layers, kv_heads, steps, past):
    cache, history, naive = Cache(layers, kv_heads), History(layers, kv_heads), []
    cache.read(past, [(0, 0)] if past else [])
    for tokens, loses, back in [(0, [], 0), *steps]:
        cache.read(tokens, loses if cache.seen + tokens else [])
        before = len(history.compactions)
        history.follow(cache)
        assert history.now.entries == cache.entries and history.now.seen == cache.seen
        if len(history.compactions) > before:
            naive.append((cache.seen, [set(held) for held in cache.sets]))
        elif tokens and back <= tokens:
            # only what no compaction has decided upon can be taken back
            cache.take_back(back)
            history.follow(cache)
    naive.append((cache.seen, cache.sets))
    copy = History.from_dict(json.loads(json.dumps(history.to_dict())))
    for found in (history, copy):
        assert len(found.compactions) == len(naive) - 1
        for at, (seen, sets) in enumerate(naive):
            number = at if at < len(naive) - 1 else None
            counts = np.zeros(cache.seen, int)
            for head, held in enumerate(sets):
                own = np.isin(np.arange(cache.seen), sorted(held)).astype(int)
                counts += own
                layer, within = divmod(head, kv_heads)
                assert found.held(number, layer, within).tolist() == own.tolist()
            assert found.held(number).tolist() == counts.tolist()
            assert found.moment(number).seen == seen
            assert sum(found.held(number, layer) for layer in range(layers)).tolist() == counts.tolist()
    assert (copy.gone == history.gone).all()


def test_nothing_is_asked_of_the_device_while_nothing_goes():
    cache, history = Cache(2, 2), History(2, 2)
    for _ in range(5):
        cache.read(3)
        history.follow(cache)
    assert cache.looks == 0 and not history.compactions
    cache.read(1, [(1, 4)])
    history.follow(cache)
    assert cache.looks == 1 and history.gone[1, 4] == 0 and (history.gone != KEPT).sum() == 1
    assert history.lost(0).tolist() == [0] * 4 + [1] + [0] * 11


def test_a_past_is_one_compaction():
    cache, history = Cache(1, 1), History(1, 1)
    cache.read(9, [(0, 2), (0, 3)])
    history.follow(cache)
    assert [moment.seen for moment in history.compactions] == [9]
    assert history.held().tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("compactions", "size"), [(3, 1), (254, 1), (255, 1), (256, 2), (300, 2)])
def test_numbers_as_large_as_needed(compactions, size):
    """One entry that goes last, and one that stays."""
    cache, history = Cache(1, 2), History(1, 2)
    cache.read(2)
    for at in range(compactions):
        cache.read(1, [(0, 2 + at), (1, 2 + at)])
        if at == compactions - 1:
            cache.read(0, [(0, 0)])
        history.follow(cache)
    data = history.to_dict()
    assert data["bytes"] == size and len(history.compactions) == compactions
    copy = History.from_dict(data)
    assert (copy.gone == history.gone).all()
    assert copy.gone[0, 0] == compactions - 1 and copy.gone[1, 0] == KEPT


def test_a_head_alone_is_refused():
    with pytest.raises(ConfigError, match="give the layer"):
        History(2, 2).held(head=1)


def test_beside_a_full_cache():
    cache, history = Cache(2, 1), History(2, 1)
    cache.read(3, [(0, 1)])
    history.follow(cache)
    shape = CacheShape(2, 1, 8, 8, 2, 32)
    data = described(history, ["a", "b", "c"], shape, [0, 4], EvictionConfig(budget=2), "m")
    assert data["full_bytes_per_token"] * 3 == shape.full_nbytes(3)
    assert data["layer_numbers"] == [0, 4] and data["texts"] == ["a", "b", "c"] and data["now"] == (3, 5, 500)


@given(st.text(max_size=30))
def test_texts_of_tokens_are_the_text(text):
    """A tokenizer of bytes, many of which are no character of their own."""
    ids = list(text.encode("utf-8", "surrogatepass"))
    decode = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", "replace")).decode
    found = token_texts(ids, decode)
    assert len(found) == len(ids) and "".join(found) == decode(ids)
