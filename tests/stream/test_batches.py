"""The way from tables to augmented batches: order, threads, groups for a decoder, and nothing that waits."""

import dataclasses
import io
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.gpu_decode import DeviceDecoder
from pipeline.stream import batches
from pipeline.training import loop
from pipeline.training.worker import build_worker
from tests.images.test_gpu_decode import picture
from tests.support.train_cases import SIZE, rows, tree, view_of, worker_of

AUGMENT = {"hflip": 0.5, "rotate": 10, "brightness": 0.2}


def jpegs(count: int, start: int = 0, progressive: tuple[int, ...] = ()) -> pa.Table:
    """``rows`` with JPEGs: labels and sizes stay."""
    table, files = rows(count, start=start), []
    for n in range(count):
        out = io.BytesIO()
        Image.fromarray(picture(SIZE, SIZE, start + n)).save(out, "JPEG", progressive=n in progressive)
        files.append(out.getvalue())
    return table.set_column(table.column_names.index("image"), "image", pa.array(files, pa.binary()))


def same(a: Batch, b: Batch, apart: float = 0.0) -> None:
    for field in dataclasses.fields(Batch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "images":
            assert (left.float() - right.float()).abs().max() <= apart
        elif isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert left is right is None or left == right, field.name


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_batches_made_in_threads_are_those_made_in_step(task):
    worker = worker_of(tree(task, augment=AUGMENT))
    tables = [rows(4, seed=n, start=4 * n) for n in range(6)]

    def views(threaded: bool):
        items = batches.decode_batches(worker.task, tables, train=True, seed=0)
        return list(batches.augmented_batches(items, worker.augment, worker.device, threaded))

    for (table, plain), (other, threaded), given in zip(views(False), views(True), tables, strict=True):
        assert table is other is given
        same(plain, threaded)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_decoder_of_groups_gives_the_batches_of_the_host(task):
    worker = worker_of(tree(task, input={"size": [48, 40]}))
    tables = [jpegs(4, start=4 * n, progressive=(n % 5,)) for n in range(9)]
    asked: list[int] = []

    class Counting(DeviceDecoder):
        def __call__(self, items):
            asked.append(len(items))
            return super().__call__(items)

    host = list(batches.decode_batches(worker.task, tables, train=True, seed=0))
    ours = list(batches.decode_batches(worker.task, tables, train=True, seed=0, decoder=Counting("cpu")))
    assert [item.table for item in ours] == tables
    for a, b in zip(host, ours, strict=True):
        same(a.batch, b.batch, apart=1)
    assert sorted(asked) == [4, 8, 8, 16], "the groups do not double"


def test_groups_are_bounded_in_images_and_in_pixels(monkeypatch):
    monkeypatch.setattr(batches, "GROUP_IMAGES", 10)
    assert [len(group) for group in batches.decode_groups([rows(4)] * 8)] == [1, 2, 2, 2, 1]
    monkeypatch.setattr(batches, "GROUP_BYTES", 3 * 5 * SIZE * SIZE)
    assert [len(group) for group in batches.decode_groups([rows(4)] * 3)] == [1, 1, 1]


@pytest.mark.parametrize("decoder", [None, DeviceDecoder("cpu")])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_image_that_cannot_be_read_is_named(decoder, prefetch):
    worker = worker_of(tree("segmentation"))
    worker.decoder = decoder
    table = jpegs(4)
    files = table["image"].to_pylist()
    files[2] = files[2][:300]
    bad = table.set_column(table.column_names.index("image"), "image", pa.array(files, pa.binary()))
    steps = loop.steps_of(worker, [table, bad], prefetch)
    assert len(next(steps).batches[0]) == 4
    with pytest.raises(InputError, match="image 'i2' of the dataset is corrupt"):
        next(steps)


def test_a_step_holds_its_accumulated_batches_and_their_positions():
    worker = worker_of(tree("segmentation", train={"steps": 2, "batch_size": 4, "accumulate": 2}))
    found = list(loop.steps_of(worker, [rows(4, start=4 * n) for n in range(4)], num_ahead=1))
    assert [np.concatenate(step.positions).tolist() for step in found] == [list(range(8)), list(range(8, 16))]
    with pytest.raises(RuntimeError, match="ended within a step: 1 batches"):
        list(loop.steps_of(worker, [rows(4)] * 3))


def test_the_thread_stops_where_the_loop_does():
    seen: list[int] = []
    closed = threading.Event()

    def endless():
        try:
            for n in range(10**9):
                seen.append(n)
                yield n
        finally:
            closed.set()

    values = batches.prefetch(endless, 2)
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    values.close()
    assert closed.wait(5), "the thread goes on"
    assert len(seen) <= 7
    count = len(seen)
    time.sleep(0.05)
    assert len(seen) == count


class Reads(TorchDispatchMode):
    """Notes whatever makes the host read a value of a tensor, which on a GPU waits for it."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name.startswith(self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("segmentation", {"name": "unet", "width": 4, "depth": 2, "norm": "batch"}),
        ("detection", {"name": "anchor_free", "norm": "batch"}),
    ],
)
def test_nothing_in_a_step_reads_the_device(task, model, monkeypatch):
    # On a CPU, and only there, torch looks whether the labels given to one_hot are in range.
    monkeypatch.setattr(F, "one_hot", lambda labels, number: (labels[..., None] == torch.arange(number)).long())
    # AdamW counts its steps on the host unless it is fused, as on a GPU; SGD counts none.
    settings = {"name": "sgd", "clip": 1.0, "ema": 0.9, "l1": 1e-6}
    worker = worker_of(tree(task, model=model, optim=settings, augment=AUGMENT))
    view = view_of(worker, rows(4))
    loop.train_step(worker, [view], 0.01)
    with Reads() as reads:
        loop.train_step(worker, [view], 0.01)
    assert reads.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_nothing_waits_and_the_batches_are_those_of_the_cpu(task, compiled):
    train = {"steps": 8, "batch_size": 4, "compile": compiled}
    config = tree(task, augment=AUGMENT, train=train)
    worker = build_worker(config, worker_of(config).info, torch.device("cuda", 0))
    assert worker.decoder is not None
    tables = [jpegs(4, start=4 * n, progressive=(1,)) for n in range(8)]
    host = worker_of(config)
    losses = []
    for table, step in zip(tables, loop.steps_of(worker, tables, num_ahead=2), strict=True):
        (view,) = step.batches
        assert (view.images.cpu() - view_of(host, table).images).abs().mean() < 0.1
        loop.train_step(worker, [view], 0.01)  # compiles, warms up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses.append(loop.train_step(worker, [view], 0.01))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
