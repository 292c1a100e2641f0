"""The task that a bundle's manifest describes."""

from pipeline.augment import InputSettings
from pipeline.models.bundle import Bundle
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task


def task_for_bundle(bundle: Bundle, threads: int = 1, multiple: int = 32) -> Task:
    """The task that a bundle's members were trained for, over its classes and input."""
    return TASKS[bundle.task](
        classes=bundle.classes,
        background=bundle.background,
        input=InputSettings.parse(bundle.manifest["input"], f"bundle '{bundle.uri}': input"),
        loss={},
        predict=bundle.manifest["predict"],
        threads=threads,
        multiple=multiple,
        calibration=bundle.manifest["calibration"],
        score_threshold=bundle.manifest["score_threshold"],
        alike=bundle.same_model,
    )
