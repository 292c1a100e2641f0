"""The loop on tensors: no Ray, a list of batches drives it."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from pipeline.runtime.progress import Progress, SilentSink
from pipeline.stream import epoch_order
from pipeline.training import checkpoint, loop, loss_readback
from pipeline.training.ray_checkpoint import save_batches
from pipeline.training.run_state import RunState, StepReport, StepSchedule
from pipeline.training.worker import Worker
from tests.support.train_cases import Validations, rows, run_loop, tree, view_of, worker_of
from tests.support.train_hooks import NoHooks


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_loop_learns_and_the_ledger_follows_the_optimiser(task):
    config = tree(task, optim={"name": "adamw", "lr": 0.01}, train={"steps": 12, "batch_size": 4, "log_every": 2})
    worker, validations = worker_of(config), Validations()
    tables = [rows(4, start=4 * i) for i in range(12)]
    state = run_loop(worker, tables, validations, every=4, steps=12)
    assert [(step, used) for step, _, used in validations.seen] == [(4, 16), (8, 32), (12, 48)]
    first, last = validations.seen[0][1], validations.seen[-1][1]
    assert last["val_loss"] < first["val_loss"]
    assert [row["step"] for row in state.history if "loss" in row] == list(range(2, 13, 2)), "a loss was not logged"
    assert first["val_images"] == 5


def test_a_batch_that_is_not_full_is_an_error_not_a_loss():
    worker = worker_of(tree("segmentation"))
    with pytest.raises(RuntimeError, match="ended within a batch: 3 rows"):
        list(loop.steps_of(worker, [rows(4), rows(3)]))


def test_early_stop_counts_validations_without_improvement():
    state = RunState()
    for value in (3.0, 2.0, 1.95, 1.99):
        state.record_validation(value, 0.1)
    assert (state.best_val_loss, state.validations_without_gain) == (2.0, 2)
    config = tree("segmentation", train={"steps": 9, "batch_size": 4, "patience": 1, "min_delta": 1e9})
    validations = Validations()
    run_loop(worker_of(config), [rows(4)] * 9, validations, every=1, steps=9)
    assert [step for step, *_ in validations.seen] == [1, 2]


def test_a_loss_that_is_not_finite_names_its_images():
    worker = worker_of(tree("segmentation"))
    with torch.no_grad():
        next(worker.module.parameters()).fill_(float("nan"))
    with pytest.raises(
        loss_readback.NonFiniteLossError, match=r"loss is nan at step 1; images of that step: i0, i1, i2, i3"
    ):
        run_loop(worker, [rows(4)] * 4)


def test_the_batch_of_a_loss_that_is_not_finite_is_kept_as_the_model_saw_it(tmp_path):
    worker, tables = worker_of(tree("segmentation")), [rows(4, start=4 * i) for i in range(4)]
    seen = view_of(worker, tables[0])
    with torch.no_grad():
        next(worker.module.parameters()).fill_(float("nan"))
    with pytest.raises(loss_readback.NonFiniteLossError) as caught:
        run_loop(worker, tables)
    folder = save_batches(caught.value, str(tmp_path), 1)
    (path,) = (tmp_path / "not-finite-step-00000001").iterdir()
    assert folder == str(path.parent)
    assert path.name == "rank-1-batch-0.safetensors"
    kept = load(path.read_bytes())
    torch.testing.assert_close(kept["images"], seen.images)
    assert torch.equal(kept["masks"], seen.masks)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["image_ids"]) == seen.image_ids


def test_before_a_preemption_one_checkpoint_is_saved_with_all_losses_read_and_no_validation():
    class Preemption(NoHooks):
        asked, saved, validated = [], [], []

        def preempted(self, step: int) -> bool:
            self.asked.append(step)
            return step >= 2

        def save(self, worker: Worker, state: RunState) -> None:
            losses = [row["step"] for row in state.history if "loss" in row]
            self.saved.append((state.step, worker.ledger.count(0, 10**9), losses))

        def validate(self, worker: Worker, state: RunState) -> None:
            self.validated.append(state.step)

    worker, hooks = worker_of(tree("segmentation", train={"steps": 6, "batch_size": 4, "log_every": 1})), Preemption()
    state = run_loop(worker, [rows(4, start=4 * i) for i in range(6)], hooks, every=4, steps=6)
    assert (state.step, hooks.asked, hooks.validated) == (6, [1, 2], [4, 6]), "once it is saved nobody asks again"
    assert hooks.saved == [(2, 8, [1, 2])]


def test_every_step_is_reported():
    class Reports(NoHooks):
        steps: list[StepReport] = []

        def on_step(self, report: StepReport) -> None:
            self.steps.append(report)

    config = tree("segmentation", train={"steps": 6, "batch_size": 4, "accumulate": 2, "log_every": 4})
    worker, reports, slept_s = worker_of(config), Reports().steps, []

    def steps():
        for step in loop.steps_of(worker, [rows(4, start=4 * i) for i in range(12)]):
            began = time.monotonic()
            time.sleep(0.03)
            slept_s.append(time.monotonic() - began)
            yield step

    state = RunState()
    progress = Progress(SilentSink(), "t", 6)
    loop.run_steps(worker, steps(), state, StepSchedule(6, 9, ""), progress, Reports())
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert {report.images for report in reports} == {8}
    assert all(slept <= report.waited_s < report.seconds for report, slept in zip(reports, slept_s, strict=True))
    assert [at for report in reports for at, _ in report.losses] == [1, 2, 3, 4, 5, 6], "each loss is reported once"
    (row,) = [row for row in state.history if "loss" in row]
    total = sum(report.seconds for report in reports)
    assert (row["step"], row["images_s"]) == (4, pytest.approx(6 * 8 / total))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path, ema):
    config = tree("segmentation", optim={"name": "adamw", "lr": 0.01, "ema": ema}, augment={"hflip": 0.5, "rotate": 10})
    tables = [rows(4, seed=i, start=4 * i) for i in range(4)]
    whole = worker_of(config)
    run_loop(whole, tables)
    first = worker_of(config)
    state = run_loop(first, tables[:2], NoHooks(), every=9)
    state.history = []
    checkpoint.save(
        tmp_path,
        0,
        first.ledger,
        model=first.module,
        average=first.average,
        optimizer=first.optimizer,
        progress=state.to_dict(),
    )
    second = worker_of(config.model_copy(update={"seed": 0}))
    restored = checkpoint.load(tmp_path, 0, model=second.module, average=second.average, optimizer=second.optimizer)
    second.ledger = checkpoint.read_ledger(str(tmp_path))
    assert second.ledger.contains(np.arange(9)).tolist() == [True] * 8 + [False]
    run_loop(second, tables[2:], state=RunState.from_dict(restored))
    for a, b in zip(
        whole.evaluated_module.state_dict().values(), second.evaluated_module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert epoch_order.plan_remaining_rows(second.ledger, 16, 4).steps == 0
