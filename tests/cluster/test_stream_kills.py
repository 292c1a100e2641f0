"""The stream through a kill: three epochs, SIGKILL of all workers in the second, another number of workers after it."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.stream import epoch_order, run_stream
from pipeline.stream.ledger import Ledger
from tests.support.tiny import make_squares

EPOCHS, BATCH, SEED = 3, 4, 5
IMAGES = 30
KEEP_EVERY = 2
"""Steps from one checkpoint to the next."""


def reader_class() -> type:
    """Local, so that it travels by value."""

    class Reader:
        """A training worker without a model: what it has read so far, and what of it checkpoints hold."""

        def __init__(self, shard: Any) -> None:
            self.shard, self.rows, self.kept = shard, [], []

        def read(self, pause_s: float) -> None:
            """All of its share; a checkpoint of the rows used up to then every ``KEEP_EVERY`` steps."""
            for step, batch in enumerate(self.shard.iter_batches(batch_size=BATCH, batch_format="pyarrow"), start=1):
                assert batch.num_rows == BATCH, "a batch that is not full"
                self.rows += zip(batch["position"].to_pylist(), batch["image_id"].to_pylist(), strict=True)
                if step % KEEP_EVERY == 0:
                    self.kept.append((step, list(self.rows)))
                time.sleep(pause_s)

        def seen(self) -> tuple[list[Any], list[Any]]:
            """(everything read, [(step, everything read up to then)])."""
            return list(self.rows), list(self.kept)

    return Reader


def start(info: DatasetInfo, ledger: Ledger, workers: int, pause_s: float) -> tuple[list[Any], list[Any], int]:
    """Workers that read all that remains of the run: (their handles, their calls, steps)."""
    order = epoch_order.EpochOrder.of(row_groups(info, "train"), SEED, 4000)
    assert order.windows > 1
    rest = epoch_order.plan_remaining_rows(ledger, EPOCHS * order.rows, BATCH * workers)
    columns = run_stream.training_columns("segmentation", info)
    shards = run_stream.dataset(order, rest, ledger, columns, BATCH, "").streaming_split(workers, equal=True)
    actor: Any = ray.remote(num_cpus=0.5, max_concurrency=2)(reader_class())
    readers = [actor.remote(shard) for shard in shards]
    return readers, [reader.read.remote(pause_s) for reader in readers], rest.steps


def order_of(info: DatasetInfo) -> list[str]:
    """The image at each position of the whole run, read by nobody's workers."""
    order = epoch_order.EpochOrder.of(row_groups(info, "train"), SEED, 4000)
    columns = tuple(run_stream.training_columns("segmentation", info))
    expand = run_stream.ExpandUnits(order, columns, 0, EPOCHS * order.rows, Ledger().to_bytes(), BATCH, "")
    units = {"id": np.arange(EPOCHS * order.windows)}
    return [name for table in expand(units) for name in table["image_id"].to_pylist()]


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> DatasetInfo:
    root = tmp_path_factory.mktemp("kills")
    found = open_dataset(make_squares(root, {"train": range(IMAGES)}, shard_bytes=6000))
    assert len(row_groups(found, "train")) > 3
    return found


PAIRS = [(1, 3), (2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(a, b, marks=() if (a, b) in PAIRS else pytest.mark.long)
        for a in (1, 2, 3)
        for b in (1, 2, 3)
    ],
)  # fmt: skip
def test_each_image_once_an_epoch_whatever_dies_and_however_many_go_on(
    info: DatasetInfo, before: int, after: int, tmp_path: Path
):
    truth = order_of(info)
    assert len(truth) == EPOCHS * IMAGES
    epochs = [truth[at : at + IMAGES] for at in range(0, len(truth), IMAGES)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]

    readers, _, _ = start(info, Ledger(), before, pause_s=0.05)
    deadline = time.monotonic() + 60
    while True:  # until the middle of the second epoch
        assert time.monotonic() < deadline
        seen = ray.get([reader.seen.remote() for reader in readers])
        if sum(len(rows) for rows, _ in seen) >= 1.4 * IMAGES:
            break
        time.sleep(0.02)
    for reader in readers:
        ray.kill(reader)  # SIGKILL
    step = min(kept[-1][0] for _, kept in seen)
    used = [row for _, kept in seen for at, rows in kept if at == step for row in rows]
    ledger = Ledger()
    ledger.add(np.array([position for position, _ in used], np.int64))
    assert ledger.count(0, 10**6) == step * BATCH * before, "a row came twice"
    assert ledger.count(0, 10**6) < len(truth)

    readers, calls, steps = start(info, ledger, after, pause_s=0)
    ray.get(calls, timeout=60)
    shares = [rows for rows, _ in ray.get([reader.seen.remote() for reader in readers])]
    assert all(rows == sorted(rows) for rows in shares), "a worker got its share in another order than the run's"
    later = [row for rows in shares for row in rows]
    for reader in readers:
        ray.kill(reader)
    assert len(later) == steps * BATCH * after
    positions = sorted(position for position, _ in used + later)
    padding = len(positions) - len(truth)
    assert 0 <= padding < BATCH * after
    assert positions == list(range(len(positions))), "a position was lost or doubled"
    for position, name in used + later:
        if position < len(truth):
            assert name == truth[position], "the order depends on the workers, or on the restart"
