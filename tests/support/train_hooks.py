"""Hooks of the training loop that do nothing: tests override what they watch."""

from pipeline.training.run_state import RunState, StepReport
from pipeline.training.worker import Worker


class NoHooks:
    """Validates nothing, saves nothing, hears of no preemption."""

    def validate(self, worker: Worker, state: RunState) -> None:
        """Leave the state as it is."""

    def preempted(self, step: int) -> bool:
        """No machine is taken away."""
        return False

    def save(self, worker: Worker, state: RunState) -> None:
        """Save nothing."""

    def on_step(self, report: StepReport) -> None:
        """Ignore the report."""
