"""Faults planted in the kernels are noticed: some of them here, all by :mod:`.mutants`."""

import pytest
from metal_host import EMULATED

from mlx_kvret.mlx_backend.kernels import launch

from .mutants import MUTANTS
from .planting import CALLS, Mutant

SOME = MUTANTS[::9]
pytestmark = pytest.mark.skipif(not EMULATED, reason="faults are planted for the emulator")


@pytest.mark.parametrize("mutant", SOME, ids=str)
def test_noticed(mutant):
    assert mutant.noticed()


@pytest.mark.parametrize("call", CALLS)
def test_without_a_fault_nothing_is_noticed(call):
    passes = ("run",) if call.startswith("chunk") else ("tsan",)
    for found_by in passes:
        assert not Mutant("common", "none", "METAL_FUNC", "METAL_FUNC", call, found_by).noticed()


def test_they_are_many_and_can_be_planted():
    assert len(MUTANTS) >= 40 and len(set(map(str, MUTANTS))) == len(MUTANTS)
    for mutant in MUTANTS:
        text = launch._source(f"{mutant.file}.metal")
        assert mutant.apply(text) != text
