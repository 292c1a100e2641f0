"""One optimiser step: its gradient over workers, batches and precisions; every head and detector learns."""

import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from pipeline import schema
from pipeline.datasets.dataset import DatasetInfo
from pipeline.errors import InputError
from pipeline.training import loop
from pipeline.training.worker import build_worker
from tests.support.train_cases import SIZE, gradient, rows, tree, view_of, worker_of


def _rank(rank: int, world_size: int, port: int, task: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    table = rows(8)
    batches = [table.slice(0, 3), table.slice(3, 2)] if rank == 0 else [table.slice(5, 1), table.slice(6, 2)]
    grad = gradient(worker_of(tree(task), rank=rank, world_size=world_size), batches)
    if rank == 0:
        torch.save(grad, Path(folder) / "grad.pt")
    model = {**tree(task).to_dict()["model"], "norm": "batch"}
    running = worker_of(tree(task, model=model, optim={"ema": 0.9}), rank=rank, world_size=world_size)
    buffers = [*running.module.buffers(), *running.evaluated_module.buffers()]
    assert buffers
    for buffer in buffers:
        buffer.fill_(rank)
    loop.share_buffers(running)
    assert not any(buffer.any() for buffer in buffers), "a rank kept statistics of its own"
    dist.destroy_process_group()


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_two_workers_and_accumulation_give_the_gradient_of_one_on_the_union(task, tmp_path):
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


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "binary_focal", "lovasz_hinge", "cross_entropy", "tversky"])
def test_a_binary_head_learns_with_either_kind_of_loss(loss: str):
    model = {"name": "unet", "width": 4, "depth": 2, "norm": "group", "head": "binary"}
    optim = {"name": "adamw", "lr": 0.02, "l1": 1e-6, "l2": 1e-4, "backbone_lr": 0.5, "layer_decay": 0.9}
    config = tree("segmentation", model=model, loss={loss: 1.0}, optim=optim)
    two = DatasetInfo("none", "t", ("a", schema.BACKGROUND), 1, ("segmentation",), {}, "f", {}, {})
    worker = build_worker(config, two, torch.device("cpu"), threads=1)
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
    metrics = loop.validate(worker, [table])
    assert set(metrics) == {"val_loss", "val_images"} | {f"val_{name}" for name in terms}
    assert metrics == loop.validate(worker, [table]), "proposals are sampled anew"
    empty = table.set_column(
        table.column_names.index("boxes"), "boxes", pa.array([[]] * 4, table.schema.field("boxes").type)
    )
    assert loop.train_step(worker, [view_of(worker, empty)], 0.01).isfinite()
    predicted = worker.task.predict(worker.module.eval()(torch.zeros(4, 3, 64, 64)), batch)
    assert len(worker.task.to_columns(worker.task.fuse([predicted]), batch)["boxes"]) == 4


def test_a_loss_that_does_not_fit_the_model_is_refused():
    with pytest.raises(InputError, match=r"loss\.name: 'aligned' does not fit model 'yolo_v1', which is trained"):
        worker_of(tree("detection", model={"name": "yolo_v1"}, loss={"name": "aligned"}))
