"""The two tasks by name, behind one interface.

base: what a task is, the interface
build: making a task, from typed settings or from a bundle's manifest
collate: rows of a table -> a batch
segmentation: a class for each pixel
segmentation_loss: its loss, a weighted sum of terms
pooled_maps: its predictions, of one member and of the pool
packed_masks: masks and maps packed with zstd, and at an image's own size
detection: boxes with a class each
box_pooling: members' predictions -> the boxes of a pool, by location or by clustering
pooled_boxes: the boxes of a pool, in the frame and in an image's own pixels
box_columns: what is written of an image's boxes
"""

from pipeline.tasks.base import Task
from pipeline.tasks.detection import Detection
from pipeline.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {"segmentation": Segmentation, "detection": Detection}

__all__ = ["TASKS", "Detection", "Segmentation", "Task"]
