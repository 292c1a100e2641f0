"""Did doubt drift: the population-stability index of the uncertainty between two folders of predictions.

PSI = sum over bins of (p - q) ln(p / q), p and q the shares of the recent and of the reference rows in a bin, the bins
deciles of the reference (Siddiqi 2006, Credit Risk Scorecards, ch. 8; its distribution under no change: Yurdakul 2018,
Western Michigan University). Usual reading: below 0.1 nothing, above 0.2 to 0.25 a shift. It is invariant under
monotone transformations of the score, symmetric in p and q, and 0 for equal shares.

Of few rows chance alone often exceeds 0.2 (100 against 100 in ten bins: every third time). Without any drift the index
is about ``(1 / N + 1 / M)`` times a chi-squared variable of bins - 1 degrees of freedom (Yurdakul 2018): a group has
drifted only above what such a variable seldom exceeds, too. Both folders must be one bundle's: else the models
differ, not the images.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import predictions
from pipeline.config import Settings
from pipeline.errors import InputError

MOST = 200_000
"""Values of a group from which the bins are cut; of more, an even sample."""
OVERALL = "all"
AREA_FLOOR = 1e-3
"""Share of an image from which on a class counts as being in it."""
_LEAVES = {"classes": ("label", "entropy", "area_fraction"), "boxes": ("label", "entropy")}


class DriftSettings(Settings):
    """Which predictions are compared, and when doubt has drifted."""

    reference: str
    """URI of predictions: those of the time when the champion was made."""
    recent: str
    """URI of predictions."""
    threshold: float = Field(default=0.2, gt=0)
    bins: int = Field(default=10, ge=2)
    least: int = Field(default=100, ge=2)
    """Rows that a group needs in both folders to be compared."""
    chance: float = Field(default=0.01, gt=0, lt=1)
    """Probability that anything is called drift where nothing drifted, over all groups together, were rows
    independent; the boxes of an image are not quite."""


def psi(reference: np.ndarray, recent: np.ndarray) -> float:
    """The index of two histograms over the same bins; half a row is added to each bin, so that none is empty."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (recent, reference))
    return float(((p - q) * np.log(p / q)).sum())


def measure_drift(settings: DriftSettings) -> dict[str, Any]:
    """Compare the two folders.

    Returns:
        ``drifted``: whether any group's index is above the threshold; ``groups``: by name (``all``: the images'
        ``uncertainty``; ``class <label>``: segmentation: its entropy in the images that show it; detection: the
        entropy of its boxes) ``{psi, limit, reference, recent}``, the index null where a side has fewer than
        ``least`` values; ``limit``: the threshold, or what chance exceeds seldom, if that is more; ``threshold``.

    Raises:
        InputError: One of the folders holds no committed predictions, or they are of different bundles.
    """
    _require_one_bundle(settings)
    samples = _samples(settings.reference)
    edges = {name: _edges(values, settings.bins) for name, values in samples.items()}
    before, after = (_histograms(uri, edges) for uri in (settings.reference, settings.recent))
    groups: dict[str, Any] = {}
    for name in sorted(edges):
        sizes = int(before[name].sum()), int(after[name].sum())
        value = psi(before[name], after[name]) if min(sizes) >= settings.least else None
        limit = max(settings.threshold, _by_chance(settings, sizes, len(edges[name]), len(edges)))
        groups[name] = {"psi": value, "limit": limit, "reference": sizes[0], "recent": sizes[1]}
    drifted = any(each["psi"] is not None and each["psi"] > each["limit"] for each in groups.values())
    return {"drifted": drifted, "threshold": settings.threshold, "groups": groups}


def describe_drift(found: dict[str, Any]) -> str:
    """The largest index beside its limit, and what it says."""
    known = {name: each for name, each in found["groups"].items() if each["psi"] is not None}
    if not known:
        return "doubt: too few predictions to compare"
    name = max(known, key=lambda each: known[each]["psi"] / known[each]["limit"])
    said, worst = "drifted" if found["drifted"] else "did not drift", known[name]
    why = "the threshold" if worst["limit"] == found["threshold"] else "of so few rows the limit"
    return f"doubt {said}: the largest stability index is {worst['psi']:.3f} ({name}), {why} {worst['limit']:.3g}"


def _require_one_bundle(settings: DriftSettings) -> None:
    manifests = [predictions.committed_manifest(uri) or {} for uri in (settings.reference, settings.recent)]
    known = [each.get("inputs", {}).get("bundle_id") for each in manifests]
    if None not in known and known[0] != known[1]:
        raise InputError(
            f"drift wants both predictions of one bundle: '{settings.reference}' is of {known[0]}, '{settings.recent}' "
            f"of {known[1]}; predict both with one"
        )


def _by_chance(settings: DriftSettings, sizes: tuple[int, int], freedom: int, groups: int) -> float:
    """What the index of one of so many groups exceeds seldom while nothing drifts; 0 where a side is empty."""
    if not min(sizes):
        return 0.0
    from scipy.special import chdtri  # here, since scipy is slow to import

    return float((1 / sizes[0] + 1 / sizes[1]) * chdtri(max(1, freedom), settings.chance / groups))


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Inner edges of bins that hold as many values each, as far as values do not repeat.

    A value that fills a whole bin by itself, as of a score that is often 0, has one of its own: what lies below it is
    told apart, even if nothing did so in the reference.
    """
    inner = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    heavy = np.array([(values == edge).sum() * bins >= len(values) for edge in inner], bool)
    return np.unique(np.concatenate([inner, np.nextafter(inner[heavy], -np.inf)]))


def _samples(uri: str) -> dict[str, np.ndarray]:
    """Values of each group, of large groups an even sample."""
    kept: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(0)
    sizes: dict[str, int] = {}
    for name, values in _values(uri):
        kept.setdefault(name, []).append(values)
        sizes[name] = sizes.get(name, 0) + len(values)
        held = sum(map(len, kept[name]))
        if held > 2 * MOST:  # thinned as a whole, so that every row stays as likely as any other
            whole = np.concatenate(kept[name])
            seen = sizes[name] - len(values)
            share = np.where(np.arange(len(whole)) < len(whole) - len(values), seen / max(1, held - len(values)), 1.0)
            kept[name] = [rng.choice(whole, MOST, replace=False, p=share / share.sum())]
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def _histograms(uri: str, edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {name: np.zeros(len(each) + 1, np.int64) for name, each in edges.items()}
    for name, values in _values(uri):
        if name in out:
            out[name] += np.bincount(np.searchsorted(edges[name], values, side="left"), minlength=len(out[name]))
    return out


def _values(uri: str) -> Iterator[tuple[str, np.ndarray]]:
    """(group, float64 values) of each file."""
    manifest = predictions.committed_manifest(uri)
    nested = "classes" if manifest is not None and manifest["task"] == "segmentation" else "boxes"
    leaves = [f"{nested}.list.element.{leaf}" for leaf in _LEAVES[nested]]  # not the boxes' class vectors
    for table in predictions.iter_tables(uri, ["uncertainty", *leaves]):
        yield OVERALL, _numbers(table["uncertainty"])
        rows = table[nested].combine_chunks().flatten()
        parts = dict(zip(rows.type.names, rows.flatten(), strict=True))
        labels, doubt = np.asarray(parts["label"]), np.asarray(parts["entropy"], np.float64)
        there = np.isfinite(doubt)
        if nested == "classes":
            there &= np.asarray(parts["area_fraction"], np.float64) > AREA_FLOOR
        for label in np.unique(labels[there]):
            yield f"class {label}", doubt[there & (labels == label)]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    values = column.drop_null().to_numpy().astype(np.float64)
    return values[np.isfinite(values)]
