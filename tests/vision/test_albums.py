"""Albums of the demo with eyes: what is in them is where they say, whatever the proportions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.demo import language as words
from mlx_kvret.demo.albums import album
from mlx_kvret.demo.pictures import CELL, DECOY, FACT, IMAGE, NAME_IDS, NAMES, PALETTE, START, STOP, cells
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.tasks import make_samples


def pixels_of(made):
    """The cells of all pictures in the order of their tokens, (cells, CELL, CELL, 3)."""
    cut = []
    for p in made.pictures:
        rows, columns = p.height // CELL, p.width // CELL
        cut.append(p.pixels.reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3))
    return np.concatenate(cut)


@settings(max_examples=25, deadline=None)
@given(st.integers(200, 900), st.integers(0, 16), st.integers(0, 2**31), st.integers(2, 7))
def test_every_fact_stands_where_it_is_said_to(tokens, seen, seed, side):
    made = album(tokens, seen, 16 - seen, seed, side=side)
    ids = np.array(made.ids)
    assert len(ids) == tokens and ids[0] == words.BOS
    assert len(made.facts) == 16 and len(made.seen) == seen
    # one run of image tokens between its borders for each picture, as long as it has cells
    starts, stops = np.flatnonzero(ids == START), np.flatnonzero(ids == STOP)
    assert [b - a - 1 for a, b in zip(starts, stops, strict=True)] == [side * side] * len(made.pictures)
    assert (ids == IMAGE).sum() == side * side * len(made.pictures)
    order = np.flatnonzero(ids == IMAGE).tolist()
    drawn = pixels_of(made)
    for name, (value, place) in made.facts.items():
        asked, answer = made.question(name)
        assert words.WORDS[asked[1]] == NAMES[name] and words.WORDS[answer] == list(PALETTE)[value]
        if name in made.seen:
            cell = drawn[order.index(place)].astype(int)
            # framed, and inked in its colour
            assert cell[0].max() < 60 and cell[:, -1].max() < 60
            ink = np.abs(cell[1:15, 2:14] - np.array(PALETTE[list(PALETTE)[value]])).max(-1) < 50
            assert ink.sum() >= 16
        else:
            assert made.ids[place - 2 : place + 1] == [words.REMEMBER, NAME_IDS[name], answer]


def test_same_seed_same_album():
    first, second, other = album(400, 8, 8, 3), album(400, 8, 8, 3), album(400, 8, 8, 4)
    assert first == second and first.ids != other.ids
    assert first.prompt().count("<|image_pad|>") == len(first.pictures)


def test_only_facts_are_framed():
    rng = np.random.default_rng(0)
    kinds = np.array([0, FACT, DECOY])
    paper, fact, decoy = cells(rng, kinds, np.zeros(3, int), np.zeros(3, int)).astype(int)
    assert fact[0].max() < 60 < paper[0].min() and decoy[0].min() > 60


@pytest.mark.parametrize("tokens, seen, told", [(60, 4, 12), (400, 12, 12), (400, 0, 0), (400, -1, 4)])
def test_what_has_no_room_is_refused(tokens, seen, told):
    with pytest.raises(ConfigError, match="facts"):
        album(tokens, seen, told)


def test_tasks_have_their_proportions():
    for name, seen in (("albums", 8), ("albums-16-0", 16), ("albums-4-12", 4), ("albums-0-16", 0)):
        (sample,) = make_samples(name, 384, 1, 0)
        (turn,) = sample.turns
        assert len(turn.ids) == 384 and sample.sees
        assert sum(turn.ids[place] == IMAGE for place in sample.useful) == seen
        assert len(turn.questions) == 16
    assert make_samples("albums", 384, 2, 0)[0] == make_samples("albums", 384, 5, 0)[0]
    with pytest.raises(ConfigError, match="at least 192"):
        make_samples("albums", 100, 1, 0)
