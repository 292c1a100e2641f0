"""How long a run is, when it is looked at and at which rate it learns, whatever workers it has."""

import math

import pytest

from pipeline.training.optimizer import OptimSettings, lr_at
from pipeline.training.run_state import RunState, StepSchedule

OPTIM = OptimSettings.parse({"lr": 1.0, "schedule": "cosine", "warmup_steps": 4}, "test")


def test_a_group_of_the_size_that_was_asked_for_counts_as_always():
    schedule = StepSchedule(20, 6, "", nominal=20, begin=7, nominal_begin=7.0)
    assert [step for step in range(8, 21) if schedule.validates_at(step)] == [12, 18, 20]
    assert [schedule.lr(OPTIM, step) for step in range(7, 20)] == [lr_at(OPTIM, step, 20) for step in range(7, 20)]
    assert StepSchedule(20, 6, "").lr(OPTIM, 3) == lr_at(OPTIM, 3, 20)


@pytest.mark.parametrize("ratio", [0.25, 1 / 3, 0.5, 0.9, 1.5, 4.0])
def test_a_group_of_another_size_looks_and_learns_at_the_same_places_of_the_run(ratio: float):
    """A run of 40 nominal steps, the last 30 of them by a group whose steps are ``ratio`` of one."""
    steps = 10 + math.ceil(30 / ratio - 1e-6)
    schedule = StepSchedule(steps, 5, "", nominal=40, begin=10, nominal_begin=10.0, ratio=ratio)
    validated = [step for step in range(11, steps + 1) if schedule.validates_at(step)]
    assert validated[-1] == steps
    places = [schedule.nominal_step(step) for step in validated]
    assert len(validated) == len({min(8, int(place / 5 + 1e-6)) for place in places}) == 6
    assert all((place + 1e-6) % 5 < ratio for place in places), "as soon as a multiple of five is reached"
    assert schedule.lr(OPTIM, 10) == pytest.approx(lr_at(OPTIM, 10, 40))
    assert schedule.lr(OPTIM, steps) == pytest.approx(lr_at(OPTIM, schedule.nominal_step(steps), 40))
    rates = [schedule.lr(OPTIM, step) for step in range(10, steps)]
    assert rates == sorted(rates, reverse=True)


def test_the_progress_of_a_run_begun_before_is_read_and_its_keys_stay():
    progress = {"step": 12, "best": 0.25, "stale": 2, "history": [{"step": 12, "time": 1.5, "val_loss": 0.3}]}
    state = RunState.from_dict(progress)
    assert (state.step, state.best_val_loss, state.validations_without_gain) == (12, 0.25, 2)
    assert state.to_dict() == progress
    assert list(state.to_dict()) == ["step", "best", "stale", "history"]
    state.log_row(13, loss=0.5)
    assert progress["history"] == state.history, "the history goes on where it ended"


def test_a_run_without_patience_never_stops_early():
    state = RunState(validations_without_gain=3)
    assert [state.stops_early(patience) for patience in (None, 3, 4)] == [False, True, False]
