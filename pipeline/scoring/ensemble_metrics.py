"""Everything that is counted while a bundle's predictions are compared with labels, as one thing that merges."""

import io
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

POOL, UNCALIBRATED, SAMPLE = "pool", "uncalibrated", "sample"
"""Keys on storage. A member's metric has its number for a key, and a member's sample ``sample`` and its number."""
_OF_CALIBRATION = ("nll", "brier", "ece", "ece_classwise", "laece", "d_ece", "nll_score", "nll_box", "pdq")
"""Figures that calibration changes."""


@dataclass
class EnsembleMetrics:
    """Counters of one purpose: metrics of pool and members, or samples that a calibration is fitted on."""

    pool: Any = None
    """Metric of the pool; None where a calibration sample is drawn instead."""
    members: list[Any] = field(default_factory=list)
    """Metric of each member, in order."""
    uncalibrated: Any = None
    """Metric of the pool as it was before calibration; None for a bundle that is not calibrated."""
    sample: Any = None
    """Sample that the pool's calibration is fitted on; None where metrics are counted instead."""
    member_samples: list[Any] = field(default_factory=list)
    """Sample that each member's own calibration is fitted on, in order; empty where members are of one model."""

    def merge(self, other: "EnsembleMetrics") -> None:
        """Add what ``other`` has counted."""
        other_counters = other._by_key()
        for key, counter in self._by_key().items():
            counter.merge(other_counters[key])

    def compute(self) -> dict[str, Any]:
        """Figures of the pool; ``members``: a list of the same of each; ``uncalibrated``: what calibration changes."""
        figures = {**self.pool.compute(), "members": [metric.compute() for metric in self.members]}
        if self.uncalibrated is not None:
            before = self.uncalibrated.compute()
            figures["uncalibrated"] = {name: before[name] for name in _OF_CALIBRATION if name in before}
        return figures

    def to_bytes(self) -> bytes:
        """All counts in one numpy archive: ``pool/<name>``, ``0/<name>``, ``1/<name>``..."""
        arrays = {
            f"{key}/{name}": array for key, counter in self._by_key().items() for name, array in counter.state().items()
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, metric: Any, sample: Any) -> Self:
        """The inverse of ``to_bytes``; ``metric`` and ``sample`` are any of the same task."""
        states: dict[str, dict[str, np.ndarray]] = {}
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for entry in archive.files:
                key, name = entry.split("/", 1)
                states.setdefault(key, {})[name] = archive[entry]
        return cls(
            pool=metric.from_state(states[POOL]) if POOL in states else None,
            members=[metric.from_state(state) for state in _numbered(states, "")],
            uncalibrated=metric.from_state(states[UNCALIBRATED]) if UNCALIBRATED in states else None,
            sample=sample.from_state(states[SAMPLE]) if SAMPLE in states else None,
            member_samples=[sample.from_state(state) for state in _numbered(states, SAMPLE)],
        )

    def _by_key(self) -> dict[str, Any]:
        """Key on storage -> counter, in the order in which they are written."""
        counters = {POOL: self.pool}
        counters |= {str(k): metric for k, metric in enumerate(self.members)}
        counters |= {UNCALIBRATED: self.uncalibrated, SAMPLE: self.sample}
        counters |= {f"{SAMPLE}{k}": sample for k, sample in enumerate(self.member_samples)}
        return {key: counter for key, counter in counters.items() if counter is not None}


def _numbered(states: dict[str, dict[str, np.ndarray]], prefix: str) -> list[dict[str, np.ndarray]]:
    """The states whose keys are ``<prefix>0``, ``<prefix>1``... without a gap."""
    numbered = []
    while f"{prefix}{len(numbered)}" in states:
        numbered.append(states[f"{prefix}{len(numbered)}"])
    return numbered
