"""Making a task: from typed settings, and from what a bundle's manifest holds."""

from typing import Any

from pipeline.images.input_settings import InputSettings
from pipeline.models.bundle import Bundle
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task


def build_task(
    name: str,
    *,
    classes: list[str],
    background: int | None,
    input: InputSettings,
    predict: Any,
    loss: Any = None,
    threads: int = 1,
    multiple: int = 32,
    calibration: dict[str, Any] | None = None,
    score_threshold: float | None = None,
    same_model: bool = True,
) -> Task:
    """The one place where a task is made.

    Args:
        name: A key of ``TASKS``.
        classes: Names in label order.
        background: Label of the implicit background, if there is one.
        input: What the network sees.
        predict: Settings of predictions, as the task's ``parse_predict`` gives them.
        loss: Settings of the loss, as the task's ``parse_loss`` gives them; None: defaults, for tasks that only score.
        threads: CPU threads that decode and resize.
        multiple: Whole-image frames are padded to a multiple of it: the model's stride.
        calibration: ``calibration`` of a bundle's manifest; None = not calibrated.
        score_threshold: Of detections: score from which a box counts as predicted; None = not chosen yet.
        same_model: Whether all members are of one model.

    Raises:
        InputError: Settings of the loss do not fit these classes.
    """
    kind = TASKS[name]
    return kind(
        classes=classes,
        background=background,
        input=input,
        loss=kind.parse_loss({}, "loss") if loss is None else loss,
        predict=predict,
        threads=threads,
        multiple=multiple,
        calibration=calibration,
        score_threshold=score_threshold,
        same_model=same_model,
    )


def task_for_bundle(bundle: Bundle, threads: int = 1, multiple: int = 32) -> Task:
    """The task that a bundle's members were trained for, over its classes and input.

    Raises:
        InputError: The manifest's ``input`` or ``predict`` holds unknown or wrong settings.
    """
    where = f"bundle '{bundle.uri}'"
    return build_task(
        bundle.task,
        classes=bundle.classes,
        background=bundle.background,
        input=InputSettings.parse(bundle.manifest["input"], f"{where}: input"),
        predict=TASKS[bundle.task].parse_predict(bundle.manifest["predict"], f"{where}: predict"),
        threads=threads,
        multiple=multiple,
        calibration=bundle.manifest["calibration"],
        score_threshold=bundle.manifest["score_threshold"],
        same_model=bundle.same_model,
    )
