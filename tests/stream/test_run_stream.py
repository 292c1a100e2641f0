"""The stream's pure parts: the order, the ledger, the cut into whole steps; and one real execution."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.shard_reader import RowGroup
from pipeline.stream import run_stream
from pipeline.stream.epoch_order import EpochOrder, plan_remaining_rows
from pipeline.stream.run_stream import ExpandUnits, Ledger


def order_of(sizes: list[int], seed: int = 0, window_bytes: int = 250) -> EpochOrder:
    groups = [RowGroup(file=f"f{i}", index=0, rows=n, num_bytes=100) for i, n in enumerate(sizes)]
    return EpochOrder.of(groups, seed, window_bytes)


def walk(order: EpochOrder, epoch: int) -> list[tuple[int, str, int]]:
    """(position, file, row) of a whole epoch."""
    out = []
    for window in range(order.windows):
        groups, start = order.window(epoch, window)
        rows = [(group.file, row) for group in groups for row in range(group.rows)]
        for k, row in enumerate(order.row_order(epoch, window, len(rows))):
            out.append((start + k, *rows[row]))
    return out


def test_every_epoch_holds_every_row_once_in_another_order():
    order = order_of([5, 7, 3, 9, 1])
    epochs = [walk(order, epoch) for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert [p for p, *_ in epoch] == list(range(number * 25, number * 25 + 25))
        assert len({(f, r) for _, f, r in epoch}) == 25
    assert [e[1:] for e in epochs[0]] != [e[1:] for e in epochs[1]]


def test_order_depends_on_seed_and_epoch_only():
    assert walk(order_of([5, 7, 3]), 2) == walk(order_of([5, 7, 3]), 2)
    assert walk(order_of([50, 7, 3]), 2) != walk(order_of([50, 7, 3], seed=1), 2)


positions = st.lists(st.integers(0, 200), max_size=60)


@given(positions, positions)
@settings(max_examples=150)
def test_ledger_is_a_set(a: list[int], b: list[int]):
    left, right = Ledger(), Ledger()
    left.add(np.array(a, np.int64))
    right.add(np.array(b, np.int64))
    both = left.union(right)
    probe = np.arange(-1, 203)
    assert set(probe[both.contains(probe)]) == set(a) | set(b)
    assert both.count(0, 100) == len({p for p in a + b if p < 100})
    back = Ledger.from_bytes(both.to_bytes())
    assert (back.intervals == both.intervals).all()
    assert (right.union(left).intervals == both.intervals).all()
    used = set(a) | set(b)
    assert both.first_free() == next(p for p in range(300) if p not in used)


@given(positions, st.integers(1, 150), st.integers(1, 16))
@settings(max_examples=150)
def test_rest_is_whole_steps(used: list[int], end: int, global_batch: int):
    ledger = Ledger()
    ledger.add(np.array(used, np.int64))
    rest = plan_remaining_rows(ledger, end, global_batch)
    free = [p for p in range(rest.stop) if p not in set(used)]
    assert len(free) == rest.steps * global_batch
    assert set(range(end)) - set(used) <= set(free)
    assert rest.stop >= end
    assert len([p for p in free if p >= end]) < global_batch


def test_expand_yields_what_the_ledger_lacks(tmp_path):
    groups = []
    for i, rows in enumerate([6, 5, 4]):
        path = str(tmp_path / f"{i}.parquet")
        pq.write_table(pa.table({"image_id": [f"{i}-{r}" for r in range(rows)]}), path)
        groups.append(RowGroup(file=path, index=0, rows=rows, num_bytes=10))
    order = EpochOrder.of(groups, 0, 25)
    assert order.windows == 2
    whole = ExpandUnits(order, ("image_id",), 0, 40, Ledger().to_bytes(), 4, "")
    tables = list(whole({"id": np.arange(2 * order.windows + 2)}))
    assert max(table.num_rows for table in tables) == 4
    table = pa.concat_tables(tables)
    assert table["position"].to_pylist() == list(range(40))
    first = table["image_id"].to_pylist()[:15]
    assert len(set(first)) == 15
    assert table["epoch"].to_pylist() == [p // 15 for p in range(40)]
    used = Ledger()
    used.add(np.array([0, 1, 2, 7, 20]))
    part = pa.concat_tables(
        list(ExpandUnits(order, ("image_id",), 0, 40, used.to_bytes(), 4, "c")({"id": np.arange(6)}))
    )
    assert part["position"].to_pylist() == [p for p in range(40) if p not in (0, 1, 2, 7, 20)]
    same = dict(zip(table["position"].to_pylist(), table["image_id"].to_pylist(), strict=True))
    assert [same[p] for p in part["position"].to_pylist()] == part["image_id"].to_pylist()
    assert set(part["resumed_from"].to_pylist()) == {"c"}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ray_splits_the_stream_evenly_and_loses_nothing(ray_local, tmp_path, world):
    path = str(tmp_path / "0.parquet")
    pq.write_table(
        pa.table({"image_id": [str(r) for r in range(41)], "image": [b"x" * 500] * 41}),
        path,
        row_group_size=16,
    )
    groups = [RowGroup(file=path, index=i, rows=n, num_bytes=500 * n) for i, n in enumerate([16, 16, 9])]
    order = EpochOrder.of(groups, 3, 500 * 20)
    rest = plan_remaining_rows(Ledger(), 3 * order.rows, 4 * world)
    dataset = run_stream.dataset(order, rest, Ledger(), ["image_id", "image"], 4, "")
    import ray

    splits = dataset.streaming_split(world, equal=True)

    @ray.remote(num_cpus=0)
    def consume(split):
        tables = list(split.iter_batches(batch_size=4, batch_format="pyarrow"))
        return [t.num_rows for t in tables], [p for t in tables for p in t["position"].to_pylist()]

    got = ray.get([consume.remote(split) for split in splits])
    assert all(set(sizes) == {4} for sizes, _ in got)
    assert {len(seen) for _, seen in got} == {rest.steps * 4}
    everything = sorted(p for _, seen in got for p in seen)
    assert everything == list(range(rest.stop))
    if world == 1:
        assert got[0][1] == everything
