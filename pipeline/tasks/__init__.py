"""The two tasks by name, behind one interface."""

from pipeline.tasks.base import Task
from pipeline.tasks.detection import Detection
from pipeline.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {"segmentation": Segmentation, "detection": Detection}

__all__ = ["TASKS", "Detection", "Segmentation", "Task"]
