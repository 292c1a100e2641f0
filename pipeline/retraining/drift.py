"""Has the uncertainty drifted: its population-stability index (PSI) between two folders of predictions.

PSI = sum over bins of (p - q) ln(p / q), p and q the shares of the recent and of the reference rows in a bin, the bins
deciles of the reference (Siddiqi 2006, Credit Risk Scorecards, ch. 8; its distribution under no change: Yurdakul 2018,
Western Michigan University). Usual reading: below 0.1 nothing, above 0.2 to 0.25 a shift. It is invariant under
monotone transformations of the score, symmetric in p and q, and 0 for equal shares.

With few rows the index often exceeds 0.2 by chance (100 against 100 in ten bins: every third time). Without any drift
it is about ``(1 / N + 1 / M)`` times a chi-squared variable of bins - 1 degrees of freedom (Yurdakul 2018): a group
has drifted only if its index is also above what such a variable seldom exceeds. Both folders must be predictions of
one bundle: otherwise the models differ, not the images.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import predictions
from pipeline.config import Settings
from pipeline.errors import InputError

MAX_SAMPLE = 200_000
"""Values of a group that its bins are computed from; a larger group is sampled evenly."""
OVERALL = "all"
"""The group of all images, by their ``uncertainty``."""
AREA_FLOOR = 1e-3
"""Share of an image above which a class counts as present in it."""
_NESTED_COLUMNS = {"classes": ("label", "entropy", "area_fraction"), "boxes": ("label", "entropy")}


class DriftSettings(Settings):
    """Which predictions are compared, and when the uncertainty has drifted."""

    reference: str
    """URI of predictions made when the champion was new."""
    recent: str
    """URI of predictions made lately."""
    threshold: float = Field(default=0.2, gt=0)
    """Index above which a group has drifted."""
    bins: int = Field(default=10, ge=2)
    """Bins of each group: quantiles of the reference."""
    least: int = Field(default=100, ge=2)
    """Rows that a group needs in both folders to be compared."""
    chance: float = Field(default=0.01, gt=0, lt=1)
    """Probability that drift is reported where nothing drifted, over all groups together, if rows are independent (the
    boxes of an image are not quite)."""


def psi(reference: np.ndarray, recent: np.ndarray) -> float:
    """The index of two histograms (B,) over the same bins; half a row is added to each bin, so that none is empty."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (recent, reference))
    return float(((p - q) * np.log(p / q)).sum())


def measure_drift(settings: DriftSettings) -> dict[str, Any]:
    """Compare the uncertainty in the two folders, group by group.

    Returns:
        ``drifted``: whether any group's index is above the threshold; ``groups``: by name (``all``: the images'
        ``uncertainty``; ``class <label>``: segmentation: its entropy in the images that show it; detection: the
        entropy of its boxes) ``{psi, limit, reference, recent}``, the index null where a side has fewer than
        ``least`` values; ``limit``: the threshold, or what chance seldom exceeds, if that is more; ``threshold``.

    Raises:
        InputError: One of the folders holds no committed predictions, or they are of different bundles.
    """
    _require_one_bundle(settings)
    # The bins come from the reference alone, and both folders are counted in them.
    samples = _samples(settings.reference)
    edges = {name: _bin_edges(values, settings.bins) for name, values in samples.items()}
    reference, recent = (_histograms(uri, edges) for uri in (settings.reference, settings.recent))
    groups: dict[str, Any] = {}
    for name in sorted(edges):
        sizes = int(reference[name].sum()), int(recent[name].sum())
        index = psi(reference[name], recent[name]) if min(sizes) >= settings.least else None
        limit = max(settings.threshold, _chance_limit(settings, sizes, len(edges[name]), len(edges)))
        groups[name] = {"psi": index, "limit": limit, "reference": sizes[0], "recent": sizes[1]}
    drifted = any(group["psi"] is not None and group["psi"] > group["limit"] for group in groups.values())
    return {"drifted": drifted, "threshold": settings.threshold, "groups": groups}


def describe_drift(drift: dict[str, Any]) -> str:
    """A sentence on what ``measure_drift`` returned: the index that is largest relative to its limit."""
    compared = {name: group for name, group in drift["groups"].items() if group["psi"] is not None}
    if not compared:
        return "doubt: too few predictions to compare"
    name = max(compared, key=lambda key: compared[key]["psi"] / compared[key]["limit"])
    worst = compared[name]
    verdict = "drifted" if drift["drifted"] else "did not drift"
    limit = "the threshold" if worst["limit"] == drift["threshold"] else "of so few rows the limit"
    return f"doubt {verdict}: the largest stability index is {worst['psi']:.3f} ({name}), {limit} {worst['limit']:.3g}"


def _require_one_bundle(settings: DriftSettings) -> None:
    """Refuse predictions of two bundles; a folder whose bundle is not recorded passes."""
    manifests = [predictions.committed_manifest(uri) or {} for uri in (settings.reference, settings.recent)]
    reference_id, recent_id = (manifest.get("inputs", {}).get("bundle_id") for manifest in manifests)
    if reference_id is not None and recent_id is not None and reference_id != recent_id:
        raise InputError(
            f"drift wants both predictions of one bundle: '{settings.reference}' is of {reference_id}, "
            f"'{settings.recent}' of {recent_id}; predict both with one"
        )


def _chance_limit(settings: DriftSettings, sizes: tuple[int, int], freedom: int, groups: int) -> float:
    """What the index of a group seldom exceeds while nothing drifts; 0 where a side is empty.

    Args:
        settings: With ``chance``, the probability for all groups together.
        sizes: Rows of the group in the reference and in the recent folder.
        freedom: Degrees of freedom: bins - 1.
        groups: Number of groups; each gets an equal part of ``chance`` (Bonferroni).
    """
    if not min(sizes):
        return 0.0
    from scipy.special import chdtri  # not above: scipy is slow to import

    return float((1 / sizes[0] + 1 / sizes[1]) * chdtri(max(1, freedom), settings.chance / groups))


def _bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Inner edges of bins that hold equally many values, as far as values do not repeat.

    A value that fills a whole bin by itself, such as the 0 of a score that is often 0, gets a bin of its own: values
    below it are counted apart, even if the reference has none.
    """
    inner = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    heavy = np.array([(values == edge).sum() * bins >= len(values) for edge in inner], bool)
    return np.unique(np.concatenate([inner, np.nextafter(inner[heavy], -np.inf)]))


def _samples(uri: str) -> dict[str, np.ndarray]:
    """Values of each group; of large groups an even sample."""
    kept: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(0)
    sizes: dict[str, int] = {}
    for name, values in _values(uri):
        kept.setdefault(name, []).append(values)
        sizes[name] = sizes.get(name, 0) + len(values)
        num_kept = sum(map(len, kept[name]))
        if num_kept > 2 * MAX_SAMPLE:
            # What was kept before stands for more rows than it has, so it is drawn with a larger weight: every row of
            # the group stays as likely as any other.
            pooled = np.concatenate(kept[name])
            rows_before = sizes[name] - len(values)
            is_older = np.arange(len(pooled)) < len(pooled) - len(values)
            weights = np.where(is_older, rows_before / max(1, num_kept - len(values)), 1.0)
            kept[name] = [rng.choice(pooled, MAX_SAMPLE, replace=False, p=weights / weights.sum())]
    return {name: np.concatenate(arrays) for name, arrays in kept.items()}


def _histograms(uri: str, edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How many values of each group fall into each of its bins; groups without edges are left out."""
    histograms = {name: np.zeros(len(inner) + 1, np.int64) for name, inner in edges.items()}
    for name, values in _values(uri):
        if name in histograms:
            bins = np.searchsorted(edges[name], values, side="left")
            histograms[name] += np.bincount(bins, minlength=len(histograms[name]))
    return histograms


def _values(uri: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name of a group, its finite float64 values) for each group of each file of predictions."""
    manifest = predictions.committed_manifest(uri)
    nested = "classes" if manifest is not None and manifest["task"] == "segmentation" else "boxes"
    # Only these columns of the nested rows are read: the boxes' class vectors would be many times as large.
    columns = [f"{nested}.list.element.{column}" for column in _NESTED_COLUMNS[nested]]
    for table in predictions.iter_tables(uri, ["uncertainty", *columns]):
        yield OVERALL, _finite_values(table["uncertainty"])
        rows = table[nested].combine_chunks().flatten()
        arrays = dict(zip(rows.type.names, rows.flatten(), strict=True))
        labels, entropy = np.asarray(arrays["label"]), np.asarray(arrays["entropy"], np.float64)
        counted = np.isfinite(entropy)
        if nested == "classes":
            counted &= np.asarray(arrays["area_fraction"], np.float64) > AREA_FLOOR
        for label in np.unique(labels[counted]):
            yield f"class {label}", entropy[counted & (labels == label)]


def _finite_values(column: pa.ChunkedArray) -> np.ndarray:
    values = column.drop_null().to_numpy().astype(np.float64)
    return values[np.isfinite(values)]
