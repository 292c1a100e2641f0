"""Predictions of segmentation: class probabilities of one member, and the pool of several, in the network's frame."""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from pipeline.uncertainty import measures


@dataclass
class Prediction:
    """One member: ``probabilities`` (N, C, h, w) float32 in the network's frame."""

    probabilities: Tensor


class PredictionMean:
    """Mean of one member's predictions on several views."""

    def __init__(self) -> None:
        self._mean = measures.RunningMean()

    def add(self, prediction: Prediction) -> None:
        """Add the prediction on one view."""
        self._mean.add(prediction.probabilities)

    def result(self) -> Prediction:
        """The mean of the probabilities added so far."""
        return Prediction(self._mean.mean)


@dataclass
class Fused:
    """The pool of M members, in the network's frame."""

    probabilities: Tensor
    """(N, C, h, w) mean over members, calibrated where the bundle is."""
    uncalibrated: Tensor
    """(N, C, h, w) mean over members before calibration; the same tensor where there is no calibration."""
    expected_entropy: Tensor
    """(N, h, w) mean of the members' entropies."""
    maps: list[Tensor]
    """M maps (N, h, w) uint8, each member's most probable class: all that is kept of a member."""
    measures: dict[str, Tensor] = field(default_factory=dict)
    """Measures of the images, (N,) float64 each, by name; empty until they are first computed."""

    @cached_property
    def total(self) -> Tensor:
        """(N, h, w) entropy of the pool."""
        # The pool of one member that is not calibrated is that member, whose entropy has been computed.
        if len(self.maps) == 1 and self.uncalibrated is self.probabilities:
            return self.expected_entropy
        return measures.entropy(self.probabilities, 1)

    @cached_property
    def mutual(self) -> Tensor:
        """(N, h, w) mutual information: what members disagree about, before calibration."""
        total = self.total if self.uncalibrated is self.probabilities else measures.entropy(self.uncalibrated, 1)
        return measures.mutual_information(total, self.expected_entropy)

    @cached_property
    def most_probable(self) -> tuple[Tensor, Tensor]:
        """The pool's largest probability (N, h, w) and its class (N, h, w) uint8."""
        return measures.most_probable(self.probabilities)
