"""A row of an arena keeps and says what it would alone, whatever happens around it."""

import pytest
from cross.rows import schedule
from host import OnMLX


@pytest.mark.parametrize("seeds", [range(start, start + 20) for start in range(0, 200, 20)], ids=str)
def test_a_row_is_as_it_would_be_alone(seeds):
    assert [fault for seed in seeds for fault in schedule(OnMLX(), seed)] == []
