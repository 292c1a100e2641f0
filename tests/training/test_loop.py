"""The loop on tensors: no Ray, a list of batches drives it."""

import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from pipeline import schema
from pipeline.datasets.dataset import DatasetInfo
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.models import device
from pipeline.runtime.progress import Progress, SilentSink
from pipeline.stream import epoch_order
from pipeline.training import checkpoint, loop, loss_readback
from pipeline.training.train_config import TrainConfig

SIZE = 32


def tree(task: str, **over):
    model = {"name": "unet", "width": 4, "depth": 2, "norm": "group"}
    if task == "detection":
        model = {"name": "anchor_free", "norm": "group"}
    base = {
        "task": task,
        "data": "none",
        "out": "none",
        "model": model,
        "loss": {"cross_entropy": 1.0, "dice": 0.5} if task == "segmentation" else {},
        "input": {"size": [SIZE, SIZE]},
        "optim": {"name": "sgd", "lr": 0.05},
        "train": {"steps": 4, "batch_size": 4},
    }
    return TrainConfig.parse({**base, **over}, "test")


def info() -> DatasetInfo:
    classes = ("a", "b", schema.BACKGROUND)
    return DatasetInfo("none", "t", classes, 2, ("segmentation", "detection"), {}, "f", {}, {})


def rows(count: int, seed: int = 0, start: int = 0) -> pa.Table:
    """Random images with one box each but every fourth, and masks with uneven amounts of void."""
    import io

    from PIL import Image

    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        pixels = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        mask = np.full((SIZE, SIZE), 2, np.uint8)
        mask[4:20, 6:22] = i % 2
        mask[: (5 * i) % SIZE] = schema.VOID
        box = {"x1": 6.0, "y1": 4.0, "x2": 22.0, "y2": 20.0, "label": i % 2, "crowd": False, "instance": 0}
        out.append(
            {
                "image_id": f"i{i}",
                "image": file.getvalue(),
                "height": SIZE,
                "width": SIZE,
                "mask": schema.pack_map(mask.tobytes()),
                "boxes": [] if i % 4 == 3 else [box],
            }
        )
    names = ["image_id", "image", "height", "width", "mask", "boxes"]
    table = pa.Table.from_pylist(out, schema=pa.schema([schema.DATASET.field(name) for name in names]))
    positions = pa.array(np.arange(start, start + count, dtype=np.int64))
    table = table.append_column("position", positions)
    table = table.append_column("epoch", pa.array(np.zeros(count, np.int64)))
    return table.append_column("resumed_from", pa.array([""] * count))


def worker_of(config: TrainConfig, **kwargs) -> loop.Worker:
    return loop.build_worker(config, info(), torch.device("cpu"), **kwargs)


def view_of(worker: loop.Worker, table: pa.Table) -> Batch:
    """The augmented batch of a table."""
    return worker.augment(worker.task.collate(table, train=True, seed=0)[0])


def gradient(worker: loop.Worker, tables: list[pa.Table]) -> torch.Tensor:
    """Gradient of one step over ``tables`` as accumulated batches, before the optimiser uses it."""
    seen: list[torch.Tensor] = []

    def spy(optimizer, args, kwargs):
        grads = [p.grad.flatten() for p in worker.module.parameters() if p.grad is not None]
        seen.append(torch.cat(grads).clone())

    worker.optimizer.register_step_pre_hook(spy)
    loop.train_step(worker, [view_of(worker, table) for table in tables], 0.01)
    return seen[0]


def _rank(rank: int, world: int, port: int, task: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    table = rows(8)
    mine = [table.slice(0, 3), table.slice(3, 2)] if rank == 0 else [table.slice(5, 1), table.slice(6, 2)]
    grad = gradient(worker_of(tree(task), rank=rank, world=world), mine)
    if rank == 0:
        torch.save(grad, Path(folder) / "grad.pt")
    model = {**tree(task).to_dict()["model"], "norm": "batch"}
    running = worker_of(tree(task, model=model, optim={"ema": 0.9}), rank=rank, world=world)
    buffers = [*running.module.buffers(), *running.evaluated_module.buffers()]
    assert buffers
    for buffer in buffers:
        buffer.fill_(rank)
    loop.share_buffers(running)
    assert not any(buffer.any() for buffer in buffers), "a rank kept statistics of its own"
    dist.destroy_process_group()


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_two_workers_and_accumulation_give_the_gradient_of_one_on_the_union(task, tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (2, port, task, str(tmp_path)), nprocs=2)
    union = gradient(worker_of(tree(task)), [rows(8)])
    both = torch.load(tmp_path / "grad.pt", weights_only=True)
    assert union.abs().max() > 1e-3
    assert (union - both).abs().max() <= 1e-5 * max(1.0, float(union.abs().max()))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_bfloat16_changes_what_the_network_says_by_rounding_only(task):
    exact = gradient(worker_of(tree(task)), [rows(8)])
    rounded = worker_of(tree(task, train={"steps": 4, "batch_size": 4, "precision": "bf16"}))
    kinds: set[torch.dtype] = set()
    conv = next(layer for layer in rounded.module.modules() if isinstance(layer, torch.nn.Conv2d))
    conv.register_forward_hook(lambda layer, args, out: kinds.add(out.dtype))
    near = gradient(rounded, [rows(8)])
    loop.validate(rounded, [rows(3)])
    assert kinds == {torch.bfloat16}
    assert near.dtype == torch.float32, "weights and their gradients stay float32"
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()


def test_compiling_changes_neither_the_gradient_nor_the_names_of_the_weights(monkeypatch):
    plain = worker_of(tree("segmentation"))
    monkeypatch.setattr(loop, "Compiled", lambda model: device.Compiled(model, backend="aot_eager"))
    worker = worker_of(tree("segmentation", train={"steps": 4, "batch_size": 4, "compile": True}))
    assert isinstance(worker.train_forward, device.Compiled)
    assert worker.module.state_dict().keys() == plain.module.state_dict().keys()
    want, have = gradient(plain, [rows(4), rows(4, seed=1)]), gradient(worker, [rows(4), rows(4, seed=1)])
    assert (want - have).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))


def test_a_compiler_that_fails_costs_one_warning(caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nat all")

    module = torch.nn.Linear(3, 2)
    compiled = device.Compiled(module, backend=broken)
    batch = torch.ones(4, 3)
    with caplog.at_level(logging.WARNING, "pipeline.models.device"):
        for _ in range(2):
            assert torch.equal(compiled(batch), module(batch))
    assert [record.name for record in caplog.records] == ["pipeline.models.device"]
    assert "runs uncompiled" in caplog.text
    assert compiled.training


@pytest.mark.parametrize(
    ("kind", "choice", "steps", "wanted"),
    [("cuda", "auto", 1000, True), ("cuda", "auto", 999, False), ("cpu", "auto", 10**6, False),
     ("cpu", True, 1, True), ("cuda", False, 10**6, False)],
)  # fmt: skip
def test_only_long_runs_on_a_gpu_are_compiled_unasked(kind, choice, steps, wanted):
    assert device.wants_compile(torch.device(kind), choice, steps) is wanted


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimiser_follows_the_device_not_the_checkpoint(name):
    worker = worker_of(tree("segmentation", optim={"name": name, "lr": 0.01}))
    loop.train_step(worker, [view_of(worker, rows(4))], 0.01)
    assert all(not group["fused"] for group in worker.optimizer.param_groups)
    device.use_fused_kernels(worker.optimizer, torch.device("cuda"))
    assert all(group["fused"] for group in worker.optimizer.param_groups)
    # What a GPU saved is restored here: torch takes the saved choice over, which is the other machine's.
    again = worker_of(tree("segmentation", optim={"name": name, "lr": 0.01}))
    again.optimizer.load_state_dict(worker.optimizer.state_dict())
    device.use_fused_kernels(again.optimizer, again.device)
    assert all(not group["fused"] for group in again.optimizer.param_groups)
    assert loop.train_step(again, [view_of(again, rows(4))], 0.01).isfinite()


def test_decoding_on_a_device_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"stream\.decode: device wants a GPU in every worker, and this one has cpu"):
        worker_of(tree("segmentation", stream={"decode": "device"}))


def run(worker: loop.Worker, tables, journal=None, looks=None, every=2, steps=4) -> loop.RunState:
    journal = journal or loop.RunState()
    plan = loop.StepSchedule(steps, every, "")

    def look(worker, journal):
        metrics = loop.validate(worker, [rows(5, seed=1)])
        journal.record_validation(metrics["val_loss"], worker.config.train.min_delta)
        if looks is not None:
            looks.append((journal.step, metrics, worker.ledger.count(0, 10**9)))

    loop.run_steps(worker, loop.steps_of(worker, tables), journal, plan, Progress(SilentSink(), "t", steps), look)
    return journal


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_loop_learns_and_the_ledger_follows_the_optimiser(task):
    config = tree(task, optim={"name": "adamw", "lr": 0.01}, train={"steps": 12, "batch_size": 4, "log_every": 2})
    worker, looks = worker_of(config), []
    tables = [rows(4, start=4 * i) for i in range(12)]
    journal = run(worker, tables, looks=looks, every=4, steps=12)
    assert [(step, used) for step, _, used in looks] == [(4, 16), (8, 32), (12, 48)]
    assert looks[-1][1]["val_loss"] < looks[0][1]["val_loss"]
    assert [row["step"] for row in journal.history if "loss" in row] == list(range(2, 13, 2)), "a loss was not logged"
    assert looks[0][1]["val_images"] == 5


def test_a_batch_that_is_not_full_is_an_error_not_a_loss():
    worker = worker_of(tree("segmentation"))
    with pytest.raises(RuntimeError, match="ended within a batch: 3 rows"):
        list(loop.steps_of(worker, [rows(4), rows(3)]))


def test_early_stop_counts_validations_without_improvement():
    journal = loop.RunState()
    for value in (3.0, 2.0, 1.95, 1.99):
        journal.record_validation(value, 0.1)
    assert (journal.best, journal.stale) == (2.0, 2)
    config = tree("segmentation", train={"steps": 9, "batch_size": 4, "patience": 1, "min_delta": 1e9})
    looks: list = []
    run(worker_of(config), [rows(4)] * 9, looks=looks, every=1, steps=9)
    assert [step for step, *_ in looks] == [1, 2]


def test_a_loss_that_is_not_finite_names_its_images():
    worker = worker_of(tree("segmentation"))
    with torch.no_grad():
        next(worker.module.parameters()).fill_(float("nan"))
    with pytest.raises(
        loss_readback.NonFiniteLossError, match=r"loss is nan at step 1; images of that step: i0, i1, i2, i3"
    ):
        run(worker, [rows(4)] * 4)


def test_the_batch_of_a_loss_that_is_not_finite_is_kept_as_the_model_saw_it(tmp_path):
    from safetensors.torch import load

    from pipeline.training.ray_train import save_batches

    worker, tables = worker_of(tree("segmentation")), [rows(4, start=4 * i) for i in range(4)]
    seen = view_of(worker, tables[0])
    with torch.no_grad():
        next(worker.module.parameters()).fill_(float("nan"))
    with pytest.raises(loss_readback.NonFiniteLossError) as caught:
        run(worker, tables)
    folder = save_batches(caught.value, str(tmp_path), 1)
    (path,) = (tmp_path / "not-finite-step-00000001").iterdir()
    assert folder == str(path.parent)
    assert path.name == "rank-1-batch-0.safetensors"
    kept = load(path.read_bytes())
    torch.testing.assert_close(kept["images"], seen.images)
    assert torch.equal(kept["masks"], seen.masks)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["image_ids"]) == seen.image_ids


def test_a_warning_keeps_one_checkpoint_with_all_losses_read_and_no_validation():
    settings = {"steps": 6, "batch_size": 4, "log_every": 1}
    worker, asked, kept, looked = worker_of(tree("segmentation", train=settings)), [], [], []
    tables = [rows(4, start=4 * i) for i in range(6)]

    def warned(step: int) -> bool:
        asked.append(step)
        return step >= 2

    def keep(worker: loop.Worker, journal: loop.RunState) -> None:
        losses = [row["step"] for row in journal.history if "loss" in row]
        kept.append((journal.step, worker.ledger.count(0, 10**9), losses))

    journal = loop.RunState()
    loop.run_steps(
        worker, loop.steps_of(worker, tables), journal, loop.StepSchedule(6, 4, ""), Progress(SilentSink(), "t", 6),
        lambda worker, journal: looked.append(journal.step), warned, keep,
    )  # fmt: skip
    assert (journal.step, asked, looked) == (6, [1, 2], [4, 6]), "once it is kept nobody asks again"
    assert kept == [(2, 8, [1, 2])]


def test_who_watches_hears_of_every_step():
    config = tree("segmentation", train={"steps": 6, "batch_size": 4, "accumulate": 2, "log_every": 4})
    worker, heard, fed = worker_of(config), [], []

    def steps():
        for step in loop.steps_of(worker, [rows(4, start=4 * i) for i in range(12)]):
            began = time.monotonic()
            time.sleep(0.03)
            fed.append(time.monotonic() - began)
            yield step

    journal = loop.RunState()
    loop.run_steps(
        worker,
        steps(),
        journal,
        loop.StepSchedule(6, 9, ""),
        Progress(SilentSink(), "t", 6),
        lambda *_: None,
        heard=heard.append,
    )
    assert [made.step for made in heard] == [1, 2, 3, 4, 5, 6]
    assert {made.images for made in heard} == {8}
    assert all(slept <= made.waited_s < made.seconds for made, slept in zip(heard, fed, strict=True))
    assert [at for made in heard for at, _ in made.losses] == [1, 2, 3, 4, 5, 6], "each loss is heard of once"
    (row,) = [row for row in journal.history if "loss" in row]
    total = sum(made.seconds for made in heard)
    assert (row["step"], row["images_s"]) == (4, pytest.approx(6 * 8 / total))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path, ema):
    config = tree("segmentation", optim={"name": "adamw", "lr": 0.01, "ema": ema}, augment={"hflip": 0.5, "rotate": 10})
    tables = [rows(4, seed=i, start=4 * i) for i in range(4)]
    whole = worker_of(config)
    run(whole, tables)
    first = worker_of(config)
    journal = loop.RunState()
    plan = loop.StepSchedule(4, 9, "")
    two = loop.steps_of(first, tables[:2])
    loop.run_steps(first, two, journal, plan, Progress(SilentSink(), "t", 4), lambda *_: None)
    progress = {"step": journal.step, "best": journal.best, "stale": 0, "history": []}
    checkpoint.save(
        tmp_path,
        0,
        first.ledger,
        model=first.module,
        average=first.average,
        optimizer=first.optimizer,
        progress=progress,
    )
    second = worker_of(config.model_copy(update={"seed": 0}))
    restored = checkpoint.load(tmp_path, 0, model=second.module, average=second.average, optimizer=second.optimizer)
    second.ledger = checkpoint.read_ledger(str(tmp_path))
    assert second.ledger.contains(np.arange(9)).tolist() == [True] * 8 + [False]
    run(second, tables[2:], journal=loop.RunState(**restored))
    for a, b in zip(
        whole.evaluated_module.state_dict().values(), second.evaluated_module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert epoch_order.plan_remaining_rows(second.ledger, 16, 4).steps == 0


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "binary_focal", "lovasz_hinge", "cross_entropy", "tversky"])
def test_a_binary_head_learns_with_either_kind_of_loss(loss: str):
    model = {"name": "unet", "width": 4, "depth": 2, "norm": "group", "head": "binary"}
    optim = {"name": "adamw", "lr": 0.02, "l1": 1e-6, "l2": 1e-4, "backbone_lr": 0.5, "layer_decay": 0.9}
    config = tree("segmentation", model=model, loss={loss: 1.0}, optim=optim)
    two = DatasetInfo("none", "t", ("a", schema.BACKGROUND), 1, ("segmentation",), {}, "f", {}, {})
    worker = loop.build_worker(config, two, torch.device("cpu"), threads=1)
    table = rows(4)
    masks = [schema.pack_map((np.frombuffer(schema.unpack_map(m, SIZE, SIZE), np.uint8) > 0).astype(np.uint8).tobytes())
             for m in table["mask"].to_pylist()]  # fmt: skip
    table = table.set_column(table.column_names.index("mask"), "mask", pa.array(masks, pa.binary()))
    batch, _ = worker.task.collate(table, train=True, seed=0)
    view = worker.augment(batch)
    values = [float(loop.train_step(worker, [view], 0.02)) for _ in range(12)]
    assert worker.module(torch.zeros(1, 3, SIZE, SIZE)).shape[1] == 1
    assert np.isfinite(values).all()
    assert values[-1] < values[0]
    predicted = worker.task.predict(worker.module(torch.zeros(1, 3, SIZE, SIZE)), batch)
    assert predicted.probabilities.shape == (1, 2, SIZE, SIZE)


def test_wrong_settings_of_a_loss_are_refused_before_the_first_step():
    for loss, word in (
        ({"binary_focal": 1}, "three|two classes"),
        ({"cross_entropy": {"weights": [1]}}, "one number for"),
    ):
        with pytest.raises(InputError, match=word):
            worker_of(tree("segmentation", loss=loss))


@pytest.mark.parametrize(
    ("model", "terms"),
    [
        ({"name": "torchvision", "arch": "fasterrcnn_mobilenet_v3_large_320_fpn", "backbone": "mobilenet_v3_small",
          "width": 64, "norm": "group"}, {"box_reg", "cls", "objectness", "rpn_box"}),
        ({"name": "torchvision", "arch": "ssdlite320_mobilenet_v3_large", "norm": "group"}, {"box", "cls"}),
        ({"name": "yolo_v1", "stride": 8, "width": 4}, {"cls", "confidence", "coord", "noobj"}),
    ],
    ids=["fasterrcnn", "ssdlite", "yolo_v1"],
)  # fmt: skip
def test_every_kind_of_detector_trains_and_is_validated(model, terms):
    worker = worker_of(tree("detection", model=model, input={"size": [64, 64]}))
    table = rows(4)
    batch, failures = worker.task.collate(table, train=True, seed=0)
    assert not failures
    before = [value.clone() for value in worker.module.parameters()]
    first = loop.train_step(worker, [worker.augment(batch)], 0.01)
    assert first.isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, worker.module.parameters(), strict=True))
    found = loop.validate(worker, [table])
    assert set(found) == {"val_loss", "val_images"} | {f"val_{name}" for name in terms}
    assert found == loop.validate(worker, [table]), "proposals are sampled anew"
    empty = table.set_column(
        table.column_names.index("boxes"), "boxes", pa.array([[]] * 4, table.schema.field("boxes").type)
    )
    assert loop.train_step(worker, [view_of(worker, empty)], 0.01).isfinite()
    predicted = worker.task.predict(worker.module.eval()(torch.zeros(4, 3, 64, 64)), batch)
    assert len(worker.task.to_columns(worker.task.fuse([predicted]), batch)["boxes"]) == 4


def test_a_loss_that_does_not_fit_the_model_is_refused():
    with pytest.raises(InputError, match=r"loss\.name: 'aligned' does not fit model 'yolo_v1', which is trained"):
        worker_of(tree("detection", model={"name": "yolo_v1"}, loss={"name": "aligned"}))
