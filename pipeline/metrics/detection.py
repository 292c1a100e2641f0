"""Detection: COCO's average precision over gathered rows, by faster-coco-eval; never by torch collectives."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

MAX_DETECTIONS = 100
"""Boxes of an image that count, best scores first: COCO's number."""


class DetectionMetric:
    """Boxes found and true, as flat columns; the average precision is computed once, from all of them.

    Rows are put in the order of image ids first, so equal scores rank alike however the rows were split.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._ids: list[str] = []
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._true: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def update(
        self,
        image_id: str,
        boxes: ArrayLike,
        scores: ArrayLike,
        labels: ArrayLike,
        true_boxes: ArrayLike,
        true_labels: ArrayLike,
        crowd: ArrayLike | None = None,
    ) -> None:
        """Count one image, once. Kept as float32: boxes xyxy in its own pixels.

        Args:
            image_id: Unique name.
            boxes: (B, 4) found.
            scores: (B,) higher = surer.
            labels: (B,) below ``num_classes``.
            true_boxes: (T, 4).
            true_labels: (T,).
            crowd: (T,) bool; a crowd box is neither right nor wrong to find. None: no crowds.
        """
        truth, names = _rows(true_boxes), np.asarray(true_labels, np.int32).reshape(-1)
        many = np.zeros(len(names), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)
        score = np.asarray(scores, np.float32).reshape(-1)
        self._ids.append(image_id)
        self._found.append((_rows(boxes), score, np.asarray(labels, np.int32).reshape(-1)))
        self._true.append((truth, names, many))

    def merge(self, other: "DetectionMetric") -> None:
        """Add the rows that ``other`` has gathered."""
        self._ids += other._ids
        self._found += other._found
        self._true += other._true

    def state(self) -> dict[str, np.ndarray]:
        """Flat columns, and the number of rows of each image."""
        found = [np.concatenate(column) for column in zip(_NO_FOUND, *self._found, strict=True)]
        true = [np.concatenate(column) for column in zip(_NO_TRUE, *self._true, strict=True)]
        return {
            "num_classes": np.array(self.num_classes),
            "image_ids": np.array(self._ids, dtype=np.str_),
            "boxes": found[0], "scores": found[1], "labels": found[2],
            "counts": np.array([len(each[0]) for each in self._found], np.int64),
            "true_boxes": true[0], "true_labels": true[1], "crowd": true[2],
            "true_counts": np.array([len(each[0]) for each in self._true], np.int64),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        out = cls(int(state["num_classes"]))
        out._ids = state["image_ids"].tolist()
        out._found = _split([state[name] for name in ("boxes", "scores", "labels")], state["counts"])
        true = [state[name] for name in ("true_boxes", "true_labels", "crowd")]
        out._true = _split(true, state["true_counts"])
        return out

    def compute(self) -> dict[str, Any]:
        """COCO's figures; null where there is no true box.

        Returns:
            - ``map``: mean over classes and IoU thresholds .50:.05:.95 of the average precision at 101
              recalls, at most 100 boxes an image; ``map50``, ``map75`` at one threshold; ``per_class`` a list
              of each class's ``map``, null where the class has no true box.
            - ``images`` that are labelled, and ``boxes``: their true ones, without crowds.
        """
        true = sum(int((~crowd).sum()) for _, _, crowd in self._true)
        known = {"images": len(self._ids), "boxes": true}
        if not true:
            none = {"map": None, "map50": None, "map75": None}
            return {**none, "per_class": [None] * self.num_classes, **known}
        precision = self._precision()
        return {
            "map": _mean(precision),
            "map50": _mean(precision[0]),
            "map75": _mean(precision[5]),
            "per_class": [_mean(precision[:, :, label]) for label in range(self.num_classes)],
            **known,
        }

    def _precision(self) -> np.ndarray:
        """(10 IoU thresholds, 101 recalls, K): -1 where a class has no true box."""
        from faster_coco_eval import COCO, COCOeval_faster

        order = np.argsort(np.array(self._ids), kind="stable").tolist()
        truth = COCO(
            {
                "info": {},
                "images": [{"id": row} for row in range(len(order))],
                "categories": [{"id": label, "name": str(label)} for label in range(self.num_classes)],
                "annotations": self._truth_rows(order),
            },
            print_function=_silent,
        )
        found = truth.loadRes(self._found_rows(order))
        judge = COCOeval_faster(truth, found, "bbox", print_function=_silent)
        judge.params.maxDets = [MAX_DETECTIONS]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
        return np.asarray(judge.eval["precision"])[:, :, :, 0, 0]

    def _truth_rows(self, order: list[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for row, image in enumerate(order):
            boxes, labels, crowd = self._true[image]
            for box, label, many in zip(_xywh(boxes), labels.tolist(), crowd.tolist(), strict=True):
                rows.append(
                    {
                        "id": len(rows) + 1,
                        "image_id": row,
                        "category_id": label,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": int(many),
                    }
                )
        return rows

    def _found_rows(self, order: list[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for row, image in enumerate(order):
            boxes, scores, labels = self._found[image]
            for box, score, label in zip(_xywh(boxes), scores.tolist(), labels.tolist(), strict=True):
                rows.append({"image_id": row, "category_id": label, "bbox": box, "score": score})
        return rows


_NO_FOUND = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
_NO_TRUE = (np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool))


def _rows(boxes: ArrayLike) -> np.ndarray:
    return np.asarray(boxes, np.float32).reshape(-1, 4)


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    wide = boxes.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()


def _split(columns: list[np.ndarray], counts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    ends = np.cumsum(counts)[:-1]
    parts = [np.split(column, ends) for column in columns]
    return list(zip(*parts, strict=True)) if len(counts) else []


def _mean(precision: np.ndarray) -> float | None:
    """Mean of what is defined, as COCO's ``summarize``."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _silent(*_: Any) -> None:
    """The evaluator's progress is nobody's business."""
