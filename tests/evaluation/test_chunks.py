"""How texts are read: the arithmetic of chunks against a cache that is filled token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.chunks import Pace
from mlx_kvret.evaluation.samples import Question, Sample, Turn

ASKED = (Question((1,), (2,)),)
TURNS = st.lists(
    st.builds(
        lambda count, scored, asked: Turn((0,) * count, ASKED if asked else (), scored),
        st.integers(1, 40),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(TURNS, st.integers(1, 30), st.integers(0, 5), st.one_of(st.none(), st.integers(1, 20)))
def test_what_is_scored_after_an_eviction(turns, budget, buffer, chunk):
    pace = Pace(chunk, buffer)
    held, evicted, touched = 0, False, False
    for turn in turns:
        left = len(turn.ids)
        while left:
            touched |= evicted and turn.scored
            count = min(left, pace.chunk(budget))
            held, left = held + count, left - count
            if held >= budget + buffer:
                held, evicted = budget, True
        touched |= evicted and bool(turn.questions)
    assert pace.touched(Sample(tuple(turns)), budget) == touched


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.integers(1, 30), st.integers(0, 5), st.integers(1, 20))
def test_the_first_compaction(tokens, budget, buffer, chunk):
    ends = [min(end, tokens) for end in range(chunk, tokens + chunk, chunk)]
    found = Pace(chunk, buffer).first_compaction(tokens, budget)
    assert found == next((end for end in ends if end >= budget + buffer), None)


def test_chunks_are_well_below_the_budget_unless_said():
    assert [Pace().chunk(budget) for budget in (1, 2, 3, 64, 1024, 4096)] == [1, 1, 1, 32, 512, 512]
    assert [Pace().buffer(budget) for budget in (1, 64)] == [1, 8]
    assert Pace(100).chunk(2) == Pace(100).chunk(None) == 100 and Pace(buffer=0).buffer(64) == 0
    for options in ({"chunk": 0}, {"chunk": 1.5}, {"buffer": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Pace(**options)
