"""Metrics of a bundle on a split: counted once, stored beside the registry, read whenever the bundle is compared.

Stored are the counts that metrics are computed from, with a row for every image, so that two bundles can be compared
image by image later, without scoring either of them again.
"""

import hashlib

from pipeline import storage
from pipeline.datasets.dataset import open_dataset
from pipeline.errors import InputError
from pipeline.models.bundle import open_bundle
from pipeline.runtime.progress import ProgressSink
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.job import score
from pipeline.tasks.build import task_for_bundle

_DIGEST_BYTES = 32
"""Length of the sha256 that stands before the counts."""


def stored_metrics_uri(folder: str, bundle_id: str, fingerprint: str, split: str) -> str:
    """Where the counts of a bundle on a split are stored; they depend on nothing else."""
    return storage.join(folder, f"{bundle_id}-{fingerprint[:16]}-{split}.npz")


def metrics_on_split(
    folder: str, bundle: str, data: str, split: str, sink: ProgressSink | None = None
) -> EnsembleMetrics:
    """Metrics of the bundle's predictions of a split against its labels: read, or counted now and stored.

    Args:
        folder: URI of the folder of stored counts.
        bundle: URI of a bundle.
        data: URI of a dataset.
        split: One of its splits.
        sink: Where progress goes, if the images are scored now.

    Raises:
        InputError: No such bundle or split, no labels, other classes; or images that could not be predicted: bundles
            would be compared on different images.
    """
    opened, info = open_bundle(bundle), open_dataset(data)
    target = stored_metrics_uri(folder, opened.id, info.fingerprint, split)
    task = task_for_bundle(opened)
    stored = _read(target)
    if stored is not None:
        return EnsembleMetrics.from_bytes(stored, task.metric(), task.new_calibration_sample())
    result = score(opened, data, split=split, measure="metrics", sink=sink)
    # Nothing is stored of a split that was predicted in part: the next comparison would count it as whole.
    failures = {status: count for status, count in result["statuses"].items() if status != "ok"}
    if failures:
        counts = ", ".join(f"{status} {count}" for status, count in sorted(failures.items()))
        raise InputError(
            f"split '{split}' of '{info.uri}': {counts} of {result['rows']} images could not be predicted, and bundles "
            "are compared on the same images; run dubito verify on it"
        )
    content = result["meters"].to_bytes()
    storage.write_bytes(target, hashlib.sha256(content).digest() + content)
    return result["meters"]


def _read(uri: str) -> bytes | None:
    """The stored counts; None where there are none, or they are damaged: then they are counted again."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
