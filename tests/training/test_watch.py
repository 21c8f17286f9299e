"""A run that goes wrong says so, once, with the setting to change; a run that goes well says nothing."""

import math

import numpy as np
import pytest

from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.packing import Batch
from mlx_kvret.training.report import Losses
from mlx_kvret.training.watch import Watch, expected_size

STEPS, TOKENS = 60, 1000


def batch():
    ids = np.zeros((1, TOKENS), np.int64)
    return Batch(ids, ids, np.arange(TOKENS)[None], ids > 0)


def warnings(course, config):
    """What is said of a run; ``course`` gives KL, soft size and gradient norm at a share of the run."""
    watch, said = Watch(config), []
    for step in range(STEPS):
        kl, size, norm = course(step / STEPS)
        losses = Losses(kl + 3, kl, 3.0, 0.0, size, size / 500)
        said += watch.step(losses, norm, batch(), (step + 1) / STEPS)
    return said + list(watch.end())


def test_what_a_cache_at_its_budget_holds():
    assert expected_size(batch(), 4) == pytest.approx((1 + 2 + 3 + 4 * (TOKENS - 3)) / TOKENS)


COURSES = {
    "good": (lambda p: (0.4 * math.exp(-5 * p) + 0.03, 120 + 380 * max(0, 1 - 2 * p), 0.3), None),
    "learns nothing": (lambda p: (0.001, 495, 1e-6), "lower --bias"),
    "overshoots": (lambda p: (0.3, 30, 1.0), "lower --learning-rate, or raise --tighten"),
    "ends above its budget": (lambda p: (0.02, 500 - 200 * p, 0.1), "ended above its budget"),
    "gets worse": (lambda p: (0.03 + 0.2 * max(0, p - 0.6), 120, 0.3), "later gates are worse"),
}


@pytest.mark.parametrize("tighten", [0.0, 0.5])
@pytest.mark.parametrize("name", COURSES)
def test_courses(name, tighten):
    course, expected = COURSES[name]
    said = warnings(course, TrainConfig(tighten=tighten, steps=STEPS))
    if expected is None and tighten:
        assert said == []
    elif expected is not None:
        assert len([text for text in said if expected in text]) == 1
        assert len(said) == 1


def test_a_few_steps_are_no_run():
    watch = Watch(TrainConfig(tighten=0.0))
    losses = Losses(3.0, 0.0, 3.0, 1.0, 495, 0.99)
    assert list(watch.step(losses, 1e-6, batch(), 1.0)) == list(watch.end()) == []
