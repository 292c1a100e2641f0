"""The real images: ingest, a few steps of training, predictions; one row an image."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipeline import predictions
from pipeline.datasets import ingest
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.models import bundle
from pipeline.runtime.progress import Progress, SilentSink
from pipeline.scoring.job import predict
from pipeline.stream import epoch_order, run_stream, validation
from pipeline.training import ensemble, loop
from pipeline.training.run_state import RunState, StepSchedule
from pipeline.training.train_config import TrainConfig
from pipeline.training.worker import Worker, build_worker
from tests.support.train_hooks import NoHooks

HELD = {"val": 0.1, "calibration": 0.1}


def few_steps(config: TrainConfig, folder: Path, steps: int) -> str:
    """Train without Ray, and write a bundle; returns its URI."""
    info = open_dataset(config.data)
    worker = build_worker(config, info, torch.device("cpu"))
    groups = row_groups(info, "train")
    order = epoch_order.EpochOrder.of(groups, 0, 2**26)
    size = config.train.batch_size
    expand = run_stream.ExpandUnits(
        order,
        tuple(run_stream.training_columns(config.task, info)),
        0,
        steps * size,
        run_stream.Ledger().to_bytes(),
        size,
        "",
    )
    units = {"id": torch.arange(steps * size).numpy()}
    state = RunState()
    val_losses: list[float] = []

    class Validation(NoHooks):
        def validate(self, worker: Worker, state: RunState) -> None:
            tables = validation.rows_of_rank(info, "val", 0, 1, run_stream.training_columns(config.task, info))
            val_losses.append(loop.validate(worker, validation.same_size_batches(tables, size))["val_loss"])

    Validation().validate(worker, state)
    rows = pa.concat_tables(expand(units))
    tables = [rows.slice(at, size) for at in range(0, steps * size, size)]
    schedule, progress = StepSchedule(steps, steps, ""), Progress(SilentSink(), "t", steps)
    loop.run_steps(worker, loop.steps_of(worker, tables), state, schedule, progress, Validation())
    assert state.step == steps
    assert val_losses[1] < val_losses[0], "the validation loss did not fall"
    weights = folder / "model.safetensors"
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in worker.evaluated_module.state_dict().items()}, weights)
    manifest = ensemble.bundle_manifest(config, info, {0: {"metrics": {"val_loss": val_losses[1]}}}, [])
    return bundle.write_bundle(str(folder / "bundle"), manifest, [weights]).uri


def test_bccd_boxes(ray_local, real_images, tmp_path):
    root = real_images / "bccd"
    made = ingest.ingest(
        "voc", str(root / "JPEGImages"), str(root / "Annotations"), str(tmp_path / "data"),
        splits=str(root / "ImageSets/Main"), options={"split_names": {"val": "test"}, "hold_out": HELD},
    )  # fmt: skip
    assert made["images"] == 292
    assert made["splits"]["test"] == 87
    assert sum(made["splits"].values()) - 87 == 205
    assert made["repairs"] == {"zero_area_box": 2}
    assert set(made["classes"]) == {"RBC", "WBC", "Platelets"}
    config = TrainConfig.parse(
        {
            "task": "detection", "data": made["uri"], "out": str(tmp_path / "out"),
            "model": {"name": "anchor_free", "width": 8}, "input": {"size": [128, 160]},
            "optim": {"lr": 0.003}, "train": {"batch_size": 8, "steps": 12, "threads": 1},
        },
        "test",
    )  # fmt: skip
    made = ensemble.train_ensemble(config, 1, resume=False, sink=SilentSink())
    predict(made.uri, config.data, str(tmp_path / "out/p"), split="test", sink=SilentSink())
    table = predictions.read(str(tmp_path / "out/p"))
    assert table.num_rows == 87 == len(set(table["image_id"].to_pylist()))
    assert set(table["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("kind", ["nuclei", "chase"])
def test_masks(ray_local, real_images, tmp_path, kind):
    root = real_images / kind
    if kind == "nuclei":
        made = ingest.ingest(
            "instances", str(root / "images"), str(root / "labels"), str(tmp_path / "data"), classes=["nucleus"],
            splits=str(root / "splits.json"), options={"split_names": {"val": "test"}, "hold_out": HELD},
        )  # fmt: skip
        assert (made["images"], made["splits"]["test"]) == (440, 60)
    else:
        made = ingest.ingest(
            "masks", str(root / "images"), str(root / "observer1"), str(tmp_path / "data"),
            classes=["background", "vessel"], options={"group": r"Image_(\d+)"},
        )  # fmt: skip
        assert made["images"] == 20
    config = TrainConfig.parse(
        {
            "task": "segmentation", "data": made["uri"], "out": str(tmp_path / "out"),
            "model": {"name": "unet", "width": 4, "depth": 3, "stem": True},
            "loss": {"cross_entropy": 1}, "input": {"size": [96, 96], "fit": "crop"},
            "augment": {"hflip": 0.5, "vflip": 0.5, "rotate": 15},
            "optim": {"lr": 0.005}, "train": {"batch_size": 8, "steps": 25 if kind == "nuclei" else 6},
        },
        "test",
    )  # fmt: skip
    uri = few_steps(config, tmp_path, config.train.steps or 0)
    source = str(root / "images") if kind == "chase" else made["uri"]
    predict(uri, source, str(tmp_path / "p"), split=None if kind == "chase" else "test", sink=SilentSink())
    table = predictions.read(str(tmp_path / "p"))
    assert table.num_rows == (20 if kind == "chase" else 60)
    assert set(table["status"].to_pylist()) == {"ok"}
    from pipeline.schema import unpack_map

    for row in table.select(["mask", "height", "width"]).slice(0, 3).to_pylist():
        assert set(unpack_map(row["mask"], row["height"], row["width"])) <= {0, 1}
