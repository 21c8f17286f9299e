"""300 damaged files of every form: refused with an error of ours, or read as what they are.

More of them, and their counts, by ``python benchmarks/reliability/fuzz.py``.
"""

import pytest

from .forms import FORMS
from .harness import run

# of a model's config.json there are three readers, and each builds the model
CASES = {name: 100 if form.slow else 300 for name, form in FORMS.items()}


@pytest.fixture(scope="module")
def outcomes():
    return run((form, 0, count) for form, count in CASES.items())


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files(outcomes, form):
    outcome = outcomes[form]
    assert not outcome.faults, "\n".join(outcome.faults[:5])
    assert outcome.cases == CASES[form]
    # the damage is damage
    assert outcome.counts["refused"] > CASES[form] // 10
