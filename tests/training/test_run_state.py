"""How long a run is, when it is looked at and at which rate it learns, whatever workers it has."""

import math

import pytest

from pipeline.training.optimizer import OptimSettings, lr_at
from pipeline.training.run_state import StepSchedule

OPTIM = OptimSettings.parse({"lr": 1.0, "schedule": "cosine", "warmup_steps": 4}, "test")


def test_a_group_of_the_size_that_was_asked_for_counts_as_always():
    plan = StepSchedule(20, 6, "", nominal=20, begin=7, nominal_begin=7.0)
    assert [step for step in range(8, 21) if plan.validates_at(step)] == [12, 18, 20]
    assert [plan.lr(OPTIM, step) for step in range(7, 20)] == [lr_at(OPTIM, step, 20) for step in range(7, 20)]
    assert StepSchedule(20, 6, "").lr(OPTIM, 3) == lr_at(OPTIM, 3, 20)


@pytest.mark.parametrize("ratio", [0.25, 1 / 3, 0.5, 0.9, 1.5, 4.0])
def test_a_group_of_another_size_looks_and_learns_at_the_same_places_of_the_run(ratio: float):
    """A run of 40 nominal steps, the last 30 of them by a group whose steps are ``ratio`` of one."""
    steps = 10 + math.ceil(30 / ratio - 1e-6)
    plan = StepSchedule(steps, 5, "", nominal=40, begin=10, nominal_begin=10.0, ratio=ratio)
    looks = [step for step in range(11, steps + 1) if plan.validates_at(step)]
    assert looks[-1] == steps
    places = [plan.nominal_step(step) for step in looks]
    assert len(looks) == len({min(8, int(place / 5 + 1e-6)) for place in places}) == 6
    assert all((place + 1e-6) % 5 < ratio for place in places), "as soon as a multiple of five is reached"
    assert plan.lr(OPTIM, 10) == pytest.approx(lr_at(OPTIM, 10, 40))
    assert plan.lr(OPTIM, steps) == pytest.approx(lr_at(OPTIM, plan.nominal_step(steps), 40))
    rates = [plan.lr(OPTIM, step) for step in range(10, steps)]
    assert rates == sorted(rates, reverse=True)
