"""One member's training run, as it is sent to the processes that train it."""

from dataclasses import dataclass
from typing import Any

from pipeline.runtime import prometheus
from pipeline.training.train_config import TrainConfig


@dataclass(frozen=True)
class MemberRun:
    """One training run as it is sent to its workers."""

    config: dict[str, Any]
    """The tree of a ``TrainConfig``; its ``seed`` is the member's own."""
    uri: str
    """The folder that Ray keeps its checkpoints in."""
    stage: str
    """Name of its progress bar."""
    threads: int
    """CPU threads of each worker."""
    board: Any = None
    """Actor that collects the progress of all members; None: nobody watches."""
    tensorboard: str = ""
    """The folder that TensorBoard reads; '' for none."""
    tags: prometheus.MetricTags = prometheus.MetricTags()
    """Labels of all metrics that its workers count."""

    def settings(self) -> TrainConfig:
        """The validated config."""
        return TrainConfig.parse(self.config, "config")
