"""How a bundle did on a split: counted once, kept beside the registry, read again whenever it is compared.

What is kept are the counts that metrics are computed from, every image's row among them, so that two bundles can be
compared image by image later, without scoring either of them again.
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

_DIGEST = 32
"""Bytes of the sha256 before the counts."""


def stored_metrics_uri(folder: str, bundle_id: str, fingerprint: str, split: str) -> str:
    """Where the counts of a bundle on a split lie; they depend on nothing else."""
    return storage.join(folder, f"{bundle_id}-{fingerprint[:16]}-{split}.npz")


def metrics_on_split(
    folder: str, bundle: str, data: str, split: str, sink: ProgressSink | None = None
) -> EnsembleMetrics:
    """What the bundle's predictions of a split come to beside its labels.

    Args:
        folder: URI of the folder that keeps the counts.
        bundle: URI of a bundle.
        data: URI of a dataset.
        split: One of its splits.
        sink: Where progress goes, if the images are scored now.

    Raises:
        InputError: No such bundle or split, no labels, other classes; or images that could not be predicted: a
            comparison would be of other images each time.
    """
    opened, info = open_bundle(bundle), open_dataset(data)
    target = stored_metrics_uri(folder, opened.id, info.fingerprint, split)
    task = task_for_bundle(opened)
    kept = _read(target)
    if kept is not None:
        return EnsembleMetrics.from_bytes(kept, task.metric(), task.new_calibration_sample())
    made = score(opened, data, split=split, measure="metrics", sink=sink)
    failed = {status: count for status, count in made["statuses"].items() if status != "ok"}
    if failed:
        found = ", ".join(f"{status} {count}" for status, count in sorted(failed.items()))
        raise InputError(
            f"split '{split}' of '{info.uri}': {found} of {made['rows']} images could not be predicted, and bundles "
            "are compared on the same images; run dubito verify on it"
        )
    content = made["meters"].to_bytes()
    storage.write_bytes(target, hashlib.sha256(content).digest() + content)
    return made["meters"]


def _read(target: str) -> bytes | None:
    """What was kept; None where nothing was, or it is damaged."""
    try:
        data = storage.read_bytes(target)
    except FileNotFoundError:
        return None
    digest, content = data[:_DIGEST], data[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None
