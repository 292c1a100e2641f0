"""Where a training run stands, and how long it is: kept in every checkpoint, planned anew at every start."""

import time
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.training import optimizer


@dataclass
class RunState:
    """How far the run has come; saved in every checkpoint."""

    step: int = 0
    """Optimiser steps that are done."""
    best_val_loss: float = float("inf")
    """Lowest validation loss that counted as an improvement."""
    validations_without_gain: int = 0
    """Validations in a row since then."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.jsonl: losses of steps, and validations."""

    def log_row(self, step: int, **figures: float) -> None:
        """Add one row to the history, with the time (seconds since 1970)."""
        self.history.append({"step": step, "time": round(time.time(), 3), **figures})

    def record_validation(self, val_loss: float, min_delta: float) -> None:
        """Count validations without an improvement by more than ``min_delta``."""
        if val_loss < self.best_val_loss - min_delta:
            self.best_val_loss = val_loss
            self.validations_without_gain = 0
        else:
            self.validations_without_gain += 1

    def stops_early(self, patience: int | None) -> bool:
        """Whether ``patience`` validations in a row brought no improvement; never with None."""
        return patience is not None and self.validations_without_gain >= patience

    def to_dict(self) -> dict[str, Any]:
        """As it is saved in a checkpoint: the keys are those of the storage format, and never change."""
        return {
            "step": self.step,
            "best": self.best_val_loss,
            "stale": self.validations_without_gain,
            "history": [dict(row) for row in self.history],
        }

    @classmethod
    def from_dict(cls, progress: dict[str, Any]) -> Self:
        """What ``to_dict`` saved."""
        return cls(
            step=progress["step"],
            best_val_loss=progress["best"],
            validations_without_gain=progress["stale"],
            history=progress["history"],
        )


@dataclass(frozen=True)
class StepReport:
    """What an optimiser step of this worker took."""

    step: int
    """Number of the step; 1 is the first of the run."""
    images: int
    """Images that this worker trained on in the step."""
    seconds: float
    """From asking for the step's data to its end."""
    waited_s: float
    """Seconds of waiting for data; on a GPU those that became known by now, of steps before this one too."""
    lr: float
    """Learning rate of the step."""
    losses: list[tuple[int, float]]
    """(step, loss) of the steps whose loss has arrived on the host since the last report."""


@dataclass(frozen=True)
class StepSchedule:
    """How long the run is, and when it validates.

    Learning rates and validations follow *nominal* steps: those of the worker group that the config asks for. A step
    of a group of another size is a fraction of a nominal step, or more than one.
    """

    steps: int
    """Number of the run's last step: steps done before this start, and those of this group."""
    validate_every: int
    """Nominal steps from one validation to the next."""
    resumed_from: str
    """Name of the checkpoint that the run goes on from; '' = from the start."""
    nominal: float | None = None
    """Nominal steps of the whole run; None: ``steps``."""
    begin: int = 0
    """Steps that were done before this start."""
    nominal_begin: float = 0.0
    """Nominal steps that were done before this start."""
    ratio: float = 1.0
    """Nominal steps in a step of this group."""

    def nominal_step(self, step: int) -> float:
        """Nominal steps that are done after step number ``step``."""
        return self.nominal_begin + (step - self.begin) * self.ratio

    def lr(self, settings: optimizer.OptimSettings, step: int) -> float:
        """Learning rate of the step that follows step number ``step``."""
        total = self.steps if self.nominal is None else self.nominal
        return optimizer.lr_at(settings, self.nominal_step(step), total)

    def validates_at(self, step: int) -> bool:
        """Whether the model is validated after step number ``step``: at multiples of ``validate_every``, and last."""
        rounding = 1e-6  # sums of ratios are not exact
        intervals_done = int((self.nominal_step(step) + rounding) / self.validate_every)
        intervals_before = int((self.nominal_step(step - 1) + rounding) / self.validate_every)
        return intervals_done > intervals_before or step == self.steps
