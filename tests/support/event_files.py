"""TensorBoard's own reader, for tests of what was written for it."""

import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import storage


def scalars(folder_uri: str) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), in the order in which TensorBoard sees them, nothing purged."""
    with tempfile.TemporaryDirectory() as folder:
        for listed in storage.list_files(folder_uri):
            (Path(folder) / listed.path).write_bytes(storage.read_bytes(storage.join(folder_uri, listed.path)))
        reader = EventAccumulator(folder, size_guidance={"scalars": 0}, purge_orphaned_data=False)
        reader.Reload()
        return {tag: [(each.step, each.value) for each in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def require_increasing(found: dict[str, list[tuple[int, float]]]) -> None:
    """Each curve has each step once, in order."""
    for tag, curve in found.items():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
