"""A worker follows its device: compiled or not, fused optimisers, the decoder."""

import logging

import pytest
import torch

from pipeline.errors import InputError
from pipeline.models import device
from pipeline.training import loop
from pipeline.training import worker as worker_module
from tests.support.train_cases import gradient, rows, tree, view_of, worker_of


def test_compiling_changes_neither_the_gradient_nor_the_names_of_the_weights(monkeypatch):
    plain = worker_of(tree("segmentation"))
    monkeypatch.setattr(worker_module, "Compiled", lambda model: device.Compiled(model, backend="aot_eager"))
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
    ("kind", "choice", "steps", "expected"),
    [("cuda", "auto", 1000, True), ("cuda", "auto", 999, False), ("cpu", "auto", 10**6, False),
     ("cpu", True, 1, True), ("cuda", False, 10**6, False)],
)  # fmt: skip
def test_only_long_runs_on_a_gpu_are_compiled_unasked(kind, choice, steps, expected):
    assert device.wants_compile(torch.device(kind), choice, steps) is expected


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
