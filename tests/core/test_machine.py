"""A budget beyond the machine is refused with the largest that fits."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.machine import check_fits, free_host_bytes
from mlx_kvret.errors import ConfigError

SHAPE = CacheShape(2, 2, 8, 8, 4, 32)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.integers(10**4, 10**8))
def test_refused_exactly_when_it_does_not_fit_and_the_advice_does(budget, free):
    config = EvictionConfig.create(budget)
    if SHAPE.nbytes(config.budget, config.buffer) <= free:
        check_fits(SHAPE, config, free)
        return
    with pytest.raises(ConfigError, match="are free") as caught:
        check_fits(SHAPE, config, free)
    advised = int(re.search(r"at most a budget of ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert advised < budget
    check_fits(SHAPE, EvictionConfig.create(advised), free)
    with pytest.raises(ConfigError):
        check_fits(SHAPE, EvictionConfig.create(advised + 1), free)


def test_the_buffer_counts_and_nothing_may_fit():
    with pytest.raises(ConfigError, match="no budget fits"):
        check_fits(SHAPE, EvictionConfig.create(1), 10)
    with pytest.raises(ConfigError, match="a buffer of 1,000,000"):
        check_fits(SHAPE, EvictionConfig.create(1, buffer=10**6), 10**6)


def test_what_is_unknown_or_unbounded_is_not_refused():
    check_fits(SHAPE, EvictionConfig.create(2**31 - 1), None)
    check_fits(SHAPE, EvictionConfig.create(2**31 - 1, policy="full"), 1)


def test_free_memory_of_this_machine():
    free = free_host_bytes()
    assert free is None or 2**20 < free < 2**50
