"""300 damaged files of every form: refused with an error of ours, or read as what they are.

More of them, and their counts, by ``python benchmarks/reliability/fuzz.py``.
"""

import pytest

from .forms import FORMS
from .harness import run

CASES = 300


@pytest.fixture(scope="module")
def outcomes():
    return run((form, 0, CASES) for form in FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files(outcomes, form):
    outcome = outcomes[form]
    assert not outcome.faults, "\n".join(outcome.faults[:5])
    assert outcome.cases == CASES
    # the damage is damage
    assert outcome.counts["refused"] > CASES // 10
