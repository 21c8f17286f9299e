"""The arithmetic of pictures in a stream of tokens, and the fixed split of a budget between modalities."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import select
from mlx_kvret.core.pictures import (
    Picture,
    chunk_ends,
    forgotten,
    from_array,
    is_picture,
    next_position,
    of_modality,
    runs,
    to_array,
)
from mlx_kvret.core.snapshot import read_snapshot, write_snapshot
from mlx_kvret.errors import CacheError, CheckpointError, ConfigError, UnsupportedFeatureError
from tests.core.test_snapshot import same, snapshot

ONE, TWO = Picture(2, 8, 2, 3, 3), Picture(10, 14, 2, 2, 2)


def test_positions_lag_behind_by_what_pictures_leave_out():
    assert next_position((), 5) == 5
    assert next_position((ONE,), 8) == 5
    assert next_position((ONE, TWO), 20) == 15
    with pytest.raises(CacheError, match="read 2 of the 4 tokens of a picture"):
        next_position((ONE, TWO), 12)


def test_what_is_taken_back_is_whole_pictures():
    assert forgotten((ONE, TWO), 20) == (ONE, TWO)
    assert forgotten((ONE, TWO), 14) == (ONE, TWO)
    assert forgotten((ONE, TWO), 10) == (ONE,) == forgotten((ONE, TWO), 8)
    assert forgotten((ONE, TWO), 2) == ()
    with pytest.raises(UnsupportedFeatureError, match="kept or forgotten as a whole"):
        forgotten((ONE, TWO), 12)


def test_runs_of_picture_tokens():
    assert runs([9, 1, 9, 9, 2, 9], {9}, 100) == [(100, 101), (102, 104), (105, 106)]
    assert runs([1, 2], {9}) == [] == runs([], {9}) == runs([1], set())


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=5),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_no_chunk_cuts_a_picture(parts, step, tail):
    spans, at = [], 0
    for gap, size in parts:
        spans.append((at + gap, at + gap + size))
        at += gap + size
    length = at + tail
    ends = chunk_ends(length, step, spans)
    starts = [0, *ends][:-1]
    assert ends == sorted(set(ends)) and (ends[-1] if ends else 0) == length
    for a, b in zip(starts, ends, strict=False):
        assert not any(start < b < end for start, end in spans)
        assert b - a <= step or (a, b) in spans
    if not spans:
        assert ends == [min(end, length) for end in range(step, length + step, step)]


def test_kept_positions_by_modality():
    kept = [[np.array([0, 3, 9]), np.array([], np.int64)], [np.array([7, 8]), np.array([12])]]
    text, picture = (of_modality(kept, (ONE, TWO), name) for name in ("text", "picture"))
    assert [[head.tolist() for head in layer] for layer in text] == [[[0, 9], []], [[8], []]]
    assert [[head.tolist() for head in layer] for layer in picture] == [[[3], []], [[7], [12]]]


def test_pictures_are_saved_and_files_without_them_stay_as_they_were(tmp_path):
    written = snapshot(seen=20, pictures=(ONE, TWO))
    write_snapshot(tmp_path / "a", written)
    found = read_snapshot(tmp_path / "a")
    same(found, written)
    assert found.pictures == (ONE, TWO) and found.next_position == 15
    write_snapshot(tmp_path / "b", snapshot())
    assert (
        b"pictures" not in (tmp_path / "b").read_bytes()
        and b"picture_share" not in (tmp_path / "b").read_bytes()
    )
    assert read_snapshot(tmp_path / "b").next_position == 5
    with pytest.raises(CheckpointError, match="a picture is told to be"):
        snapshot(seen=12, pictures=(ONE, TWO))


@pytest.mark.parametrize(
    "rows",
    [
        [[2, 2, 0, 0, 1]],
        [[-1, 2, 0, 0, 1]],
        [[0, 4, 3, 1, 1]],
        [[0, 4, 0, 0, 0]],
        [[4, 6, 0, 0, 1], [0, 2, 0, 0, 1]],
    ],
)
def test_impossible_pictures_are_refused(rows):
    with pytest.raises(CheckpointError, match="told to be"):
        from_array(np.array(rows, np.int32), 10)


def test_pictures_of_another_shape_or_type_are_refused():
    for bad in (np.zeros((1, 4), np.int32), np.zeros((1, 5), np.float32), np.zeros(5, np.int32)):
        with pytest.raises(CheckpointError, match="expected int32"):
            from_array(bad, 10)
    assert from_array(to_array(()), 0) == ()


# ---------------------------------------------------------------- the fixed split


def plainly(entries, seen, config, heads, pictures):
    """Kept entries of a list of (score, position, head), filled bucket by bucket."""
    wanted, seeing = config.budget * heads, is_picture(pictures, seen)
    if len(entries) < (config.budget + config.buffer) * heads:
        return {e[1:] for e in entries}
    best = sorted(entries, key=lambda e: (e[0], e[1], -e[2]), reverse=True)
    safe = [e for e in best if e[1] < config.sinks or e[1] >= seen - config.window]
    share = int(config.picture_share * wanted + 0.5)
    room = {True: share, False: wanted - share}
    for e in safe:
        room[bool(seeing[e[1]])] -= 1
    kept = list(safe)
    over = -min(0, *room.values())
    for modality in (True, False):
        own = [e for e in best if e not in safe and bool(seeing[e[1]]) == modality]
        kept += own[: max(0, room[modality] - over)]
    kept += [e for e in best if e not in kept][: wanted - len(kept)]
    if config.threshold is not None:
        kept = [e for e in kept if e in safe or e[0] >= np.float32(np.log(config.threshold))]
    return {e[1:] for e in kept}


@st.composite
def cases(draw):
    layers, kv_heads, seen = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    budget = draw(st.integers(1, 5))
    sinks = draw(st.integers(0, budget))
    learned = draw(st.booleans())
    config = EvictionConfig.create(
        budget,
        draw(st.integers(0, 2)),
        scope="modality",
        policy="learned" if learned else "knorm",
        sinks=sinks,
        window=draw(st.integers(0, budget - sinks)),
        picture_share=draw(st.sampled_from([None, 0, 1, 0.3, 0.5])),
        threshold=draw(st.sampled_from([None, 0.5])) if learned else None,
    )
    places = [(p, h) for p in range(seen) for h in range(layers * kv_heads)]
    safe = [p for p in places if p[0] < sinks or p[0] >= seen - config.window]
    held = [p for p in places if p in safe or draw(st.booleans())]
    entries = [(float(draw(st.sampled_from([-3, -1, -0.5, 0]))), *p) for p in held]
    a, b, c, d = sorted(draw(st.lists(st.integers(0, seen), min_size=4, max_size=4)))
    pictures = tuple(Picture(x, y, 0, 0, y - x) for x, y in ((a, b), (c, d)) if y > x)
    return entries, seen, config, layers, kv_heads, pictures


@settings(max_examples=150, deadline=None)
@given(cases())
def test_each_modality_has_its_share(case):
    entries, seen, config, layers, kv_heads, pictures = case
    score, position, head = np.array(entries, np.float64).reshape(-1, 3).T
    keep = select(score, position.astype(int), head.astype(int), seen, config, layers, kv_heads, pictures)
    found = {e[1:] for e, stays in zip(entries, keep, strict=True) if stays}
    assert found == plainly(entries, seen, config, layers * kv_heads, pictures)


def test_what_pictures_do_not_fill_is_the_texts():
    config = EvictionConfig.create(4, 0, scope="modality", picture_share=0.75)
    score, position, head = np.arange(8.0), np.arange(8), np.zeros(8, int)
    kept = lambda *pictures: np.flatnonzero(select(score, position, head, 8, config, 1, 1, pictures)).tolist()  # noqa: E731
    assert kept(Picture(0, 5, advance=5)) == [2, 3, 4, 7]
    assert kept(Picture(0, 2, advance=2)) == [0, 1, 6, 7]
    assert kept() == [4, 5, 6, 7]


def test_the_share_goes_with_its_scope():
    assert EvictionConfig.create(8, scope="modality").picture_share == 0.5
    assert "picture_share" not in EvictionConfig.create(8).to_dict()
    back = EvictionConfig.create(8, scope="modality", picture_share=0.25)
    assert EvictionConfig.from_dict(back.to_dict()) == back
    with pytest.raises(ConfigError, match="a share goes with the scope 'modality'"):
        EvictionConfig.create(8, picture_share=0.5)
    for bad in (-0.1, 1.5, "half", float("nan")):
        with pytest.raises(ConfigError, match="a part of the budget"):
            EvictionConfig.create(8, scope="modality", picture_share=bad)
    with pytest.raises(ConfigError, match="splits the budget already"):
        dataclasses.replace(back, min_per_head=1)
