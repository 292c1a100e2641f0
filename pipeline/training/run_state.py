"""Where a training run stands, and how long it is: kept in every checkpoint, planned anew at every start."""

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.training import optimizer


@dataclass
class RunState:
    """What rank 0 knows of the run so far; saved in every checkpoint."""

    step: int = 0
    best: float = float("inf")
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def log_row(self, step: int, **figures: float) -> None:
        """One row of the history, with the time (seconds since 1970)."""
        self.history.append({"step": step, "time": round(time.time(), 3), **figures})

    def record_validation(self, val_loss: float, min_delta: float) -> None:
        """Count validations without an improvement by more than ``min_delta``."""
        if val_loss < self.best - min_delta:
            self.best, self.stale = val_loss, 0
        else:
            self.stale += 1


@dataclass(frozen=True)
class StepReport:
    """An optimiser step of this worker, as those hear of it who watch the run."""

    step: int
    images: int
    """Of this worker."""
    seconds: float
    """Since its data was asked for."""
    waited_s: float
    """Waited for data; on a GPU what became known of it by now, of steps before this one too."""
    lr: float
    losses: list[tuple[int, float]]
    """(step, loss) of the steps whose loss has arrived by now."""


@dataclass(frozen=True)
class StepSchedule:
    """How long this run is, and from which checkpoint it goes on ('' = from the start).

    Learning rates and validations follow *nominal* steps: those of the worker group that was asked for. Those of a
    group of another size are a fraction of one, or more.
    """

    steps: int
    """The number of the last step of this group, those of its forerunners counted as they were."""
    validate_every: int
    """Nominal steps."""
    resumed_from: str
    nominal: float | None = None
    """Nominal steps of the whole run; None: ``steps``."""
    begin: int = 0
    """Steps that were made before this start."""
    nominal_begin: float = 0.0
    """The same in nominal steps."""
    ratio: float = 1.0
    """Nominal steps in a step of this group."""

    def nominal_step(self, step: int) -> float:
        """Nominal steps that are done after step number ``step``."""
        return self.nominal_begin + (step - self.begin) * self.ratio

    def lr(self, settings: optimizer.OptimSettings, step: int) -> float:
        """Learning rate of the step after ``step`` steps."""
        return optimizer.lr_at(settings, self.nominal_step(step), self.steps if self.nominal is None else self.nominal)

    def validates_at(self, step: int) -> bool:
        """Whether the model is validated after step number ``step``."""
        tiny = 1e-6  # of sums of ratios
        due = int((self.nominal_step(step) + tiny) / self.validate_every) > int(
            (self.nominal_step(step - 1) + tiny) / self.validate_every
        )
        return due or step == self.steps
