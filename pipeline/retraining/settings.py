"""Settings of a scheduled retraining run."""

from typing import Any, Literal

from pydantic import Field

from pipeline.config import Settings
from pipeline.retraining.drift import DriftSettings
from pipeline.retraining.promotion import JudgeSettings


class FrozenSettings(Settings):
    """The frozen test: the same images for every comparison of a challenger with a champion."""

    data: str
    """URI of a dataset."""
    split: Literal["train", "val", "calibration", "test"] = "test"


class RetrainConfig(Settings):
    """Settings of a scheduled run."""

    name: str
    """Name of the model in the registry."""
    registry: str
    """URI of the registry."""
    work: str
    """URI of a folder; each run writes into a subfolder named by its id."""
    data: str
    """URI of a dataset, or of a folder of datasets, of which the last by name counts (``9`` before ``10``)."""
    recipe: dict[str, Any]
    """A config of ``dubito train`` without ``data`` and ``out``; in a file, the path of one is enough."""
    members: int = Field(default=1, ge=1)
    """Of the challenger."""
    start: Literal["fresh", "warm"] = "fresh"
    """``warm``: the backbone begins with the champion's weights."""
    least_new: int = Field(default=1, ge=1)
    """Labelled images that the champion's dataset did not have, or not with these labels; fewer are no reason to
    train."""
    test: FrozenSettings | None = None
    """null: the ``test`` split of the first champion's dataset."""
    newest: Literal["val", "calibration", "test"] = "test"
    """The split of ``data`` whose images, as far as the champion's dataset did not have them, are the newest data:
    held out by hash before training (``hold_out.test`` of ``dubito ingest``)."""
    drift: DriftSettings | None = None
    """Predictions whose uncertainty is compared; null: drift is not measured."""
    judge: JudgeSettings = Field(default_factory=JudgeSettings)
    """How much worse than the champion a challenger may be."""
    lock_s: float = Field(default=900.0, gt=0)
    """Seconds after which the lock of a run that died expires."""
