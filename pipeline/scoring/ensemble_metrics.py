"""Everything that is counted while a bundle's predictions are compared with labels, as one thing that merges."""

import io
from typing import Any, Self

import numpy as np

POOL, UNCALIBRATED, SAMPLE = "pool", "uncalibrated", "sample"
_OF_CALIBRATION = ("nll", "brier", "ece", "ece_classwise", "laece", "d_ece", "nll_score", "nll_box", "pdq")


def member_sample(k: int) -> str:
    """The name of member ``k``'s own sample, where members are unlike."""
    return f"{SAMPLE}{k}"


class EnsembleMetrics:
    """Counters by name.

    ``pool``; ``0``, ``1``... for the members; ``uncalibrated`` for the pool as it was before calibration; and
    ``sample``, from which a calibration is fitted, with ``sample0``... of unlike members. Any may be absent.
    """

    def __init__(self, counters: dict[str, Any]) -> None:
        self.counters = counters

    @property
    def pool(self) -> Any:
        """The metric of the pool."""
        return self.counters[POOL]

    @property
    def members(self) -> list[Any]:
        """The metrics of the members, in order."""
        return [self.counters[str(k)] for k in range(sum(name.isdigit() for name in self.counters))]

    @property
    def sample(self) -> Any:
        """What the pool's calibration is fitted on."""
        return self.counters[SAMPLE]

    @property
    def member_samples(self) -> list[Any]:
        """What calibrations of unlike members are fitted on, in order."""
        count = sum(name.startswith(SAMPLE) for name in self.counters) - 1
        return [self.counters[member_sample(k)] for k in range(count)]

    def merge(self, other: "EnsembleMetrics") -> None:
        """Add what ``other`` has counted."""
        for name, counter in self.counters.items():
            counter.merge(other.counters[name])

    def compute(self) -> dict[str, Any]:
        """Of the pool; ``members``: a list of the same for each; ``uncalibrated``: what calibration changes."""
        out = {**self.pool.compute(), "members": [metric.compute() for metric in self.members]}
        if UNCALIBRATED in self.counters:
            before = self.counters[UNCALIBRATED].compute()
            out["uncalibrated"] = {key: before[key] for key in _OF_CALIBRATION if key in before}
        return out

    def to_bytes(self) -> bytes:
        """All counts in one numpy archive: ``pool/<name>``, ``0/<name>``, ``1/<name>``..."""
        arrays = {
            f"{owner}/{name}": value
            for owner, counter in self.counters.items()
            for name, value in counter.state().items()
        }
        out = io.BytesIO()
        np.savez_compressed(out, allow_pickle=False, **arrays)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, metric: Any, sample: Any) -> Self:
        """Undo ``to_bytes``; ``metric`` and ``sample`` are any of the same task."""
        states: dict[str, dict[str, np.ndarray]] = {}
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for name in archive.files:
                owner, key = name.split("/", 1)
                states.setdefault(owner, {})[key] = archive[name]
        kinds = {owner: sample if owner.startswith(SAMPLE) else metric for owner in states}
        return cls({owner: kinds[owner].from_state(state) for owner, state in states.items()})
