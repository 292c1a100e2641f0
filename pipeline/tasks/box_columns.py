"""What is written of an image's boxes: measures of uncertainty, and a row for each box."""

import math
from typing import Any

import torch

from pipeline.tasks.pooled_boxes import ImageBoxes, expected_error

_STD = ("std_x1", "std_y1", "std_x2", "std_y2")


def measure_image(image: ImageBoxes, score_threshold: float, operating: float) -> dict[str, float]:
    """All measures of an image's uncertainty, by name.

    Args:
        image: The boxes of one image.
        score_threshold: Boxes from this score on are written.
        operating: Score from which a box counts as predicted.
    """
    kept = image.kept
    # Boxes down to a lower score are kept for metrics; uncertainty is of what is written.
    written = image.scores >= score_threshold
    entropy, scores = kept.entropy[written].double(), image.scores[written].double()
    absent = 1 - kept.votes[written].double() / image.members
    measures = {
        "entropy_sum": image.entropy_sum,
        "mutual_information_sum": image.mutual_information_sum,
        "box_entropy_mean": entropy.sum() / written.sum().clamp(min=1),
        "box_entropy_max": entropy.max() if len(entropy) else entropy.sum(),
        "missed_votes": (absent * scores).sum(),
        "expected_error": expected_error(kept.scores, image.scores >= operating),
    }
    # One copy to the host for all of them.
    values = torch.stack([value.double() for value in measures.values()]).tolist()
    return dict(zip(measures, values, strict=True))


def box_rows(image: ImageBoxes, score_threshold: float) -> list[dict[str, Any]]:
    """The boxes from ``score_threshold`` on, as rows of ``schema.PREDICTED_BOX``, the best score first."""
    written = image.scores >= score_threshold
    kept = image.kept
    numbers = [
        image.boxes[written], kept.labels[written][:, None], image.scores[written][:, None],
        kept.entropy[written][:, None], kept.mutual_information[written][:, None], kept.votes[written][:, None],
        image.std[written], kept.probabilities[written],
    ]  # fmt: skip
    # One copy to the host for all boxes: x1, y1, x2, y2, label, score, entropy, mutual information, votes,
    # four standard deviations, class probabilities.
    table = torch.cat([number.double() for number in numbers], 1).tolist()
    return [
        {
            "x1": row[0], "y1": row[1], "x2": row[2], "y2": row[3],
            "label": int(row[4]), "score": row[5], "probabilities": row[13:],
            "entropy": row[6], "mutual_information": row[7], "votes": int(row[8]),
        } | {name: None if math.isnan(value) else value for name, value in zip(_STD, row[9:13], strict=True)}
        for row in table
    ]  # fmt: skip
