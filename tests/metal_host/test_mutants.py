"""The harness on trial: every example kernel is clean in all passes, every planted fault is noticed."""

import pytest

from metal_host import EMULATED, KernelError, check
from metal_host import example_kernels as examples
from metal_host.mutants import MUTANTS

BUILT = {make.__name__: make() for make in examples.ALL}


@pytest.mark.parametrize("name", BUILT)
def test_originals_are_clean(name):
    example = BUILT[name]
    check(example.call, example.twin, example.tol)


@pytest.mark.skipif(not EMULATED, reason="faults are planted for the emulator")
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(mutant):
    example = BUILT[mutant.example]
    source = mutant.apply(examples.source_of(mutant.example))
    passes = ["run" if mutant.found_by == "types" else mutant.found_by]
    with pytest.raises(KernelError) as noticed:
        check(lambda: example.call(source), example.twin, example.tol, passes)
    assert noticed.value.found_by == mutant.found_by


@pytest.mark.skipif(not EMULATED, reason="faults are planted for the emulator")
def test_forgotten_init_value_is_noticed():
    example = BUILT["histogram"]
    for found_by, message in (("tsan", "which no one has written"), ("run", "differ from the twin")):
        with pytest.raises(KernelError, match=message):
            check(lambda: example.call(init_value=None), example.twin, passes=[found_by])


def test_mutants_are_many_and_of_every_kind():
    assert len(MUTANTS) >= 40
    assert {m.example for m in MUTANTS} >= {"row_sum", "softmax", "attention", "select", "compact", "scan"}
    assert {m.found_by for m in MUTANTS} == {"types", "asan", "tsan", "run"}
