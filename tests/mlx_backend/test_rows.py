"""A row of an arena keeps and says what it would alone, whatever happens around it."""

import numpy as np
import pytest
from cross.rows import schedule
from host import OnMLX

from mlx_kvret.core.config import EvictionConfig


@pytest.mark.parametrize("seeds", [range(start, start + 20) for start in range(0, 200, 20)], ids=str)
def test_a_row_is_as_it_would_be_alone(seeds):
    assert [fault for seed in seeds for fault in schedule(OnMLX(), seed)] == []


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_pass_of_padding_alone_changes_nothing(tokens):
    host = OnMLX()
    batch = host.new(EvictionConfig(budget=4, buffer=3))
    batch.extend(host.new(EvictionConfig(budget=4, buffer=3)))
    host.read(batch, [list(range(9)), [1, 2]])
    before = [host.kept(batch, row) for row in range(2)]
    batch.expect([0, 0])
    batch.prepare(tokens)
    batch.reading, undo = batch.begin(tokens)
    batch.passes.begin(undo)
    out = [host._layer(batch.reading, layer, np.full((2, tokens), -1)) for layer in range(2)]
    batch.finish()
    batch.passes.commit()
    batch.expect(None)
    assert not any(np.array(one).any() for one in out)
    assert [host.kept(batch, row) for row in range(2)] == before
    host.read(batch, [[3], [4]])
