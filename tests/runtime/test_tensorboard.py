"""TensorBoard files while a run goes on: what its own reader sees after each look, after a crash, and on S3."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import storage
from pipeline.runtime import tensorboard
from tests.support.event_files import require_increasing, scalars


def history(until: int, start: int = 1, worth: float = 1.0) -> list[dict[str, Any]]:
    """A row every 2 steps, a look every 6."""
    rows: list[dict[str, Any]] = []
    for step in range(start, until + 1):
        if step % 2 == 0:
            rows.append(
                {"step": step, "time": 1000.0 + step, "loss": worth / step, "lr": 0.1, "step_s": 0.5, "images_s": 8}
            )
        if step % 6 == 0:
            rows.append({"step": step, "time": 1000.5 + step, "val_loss": worth, "val_dice": 0.5, "val_images": 3})
    return rows


def test_a_reader_that_is_open_sees_each_look(tmp_path: Path):
    folder = tmp_path / "tensorboard" / "0"
    tensorboard.publish(str(folder), history(6), 6)
    reader = EventAccumulator(str(folder)).Reload()
    assert sorted(reader.Tags()["scalars"]) == [
        "loss/train", "loss/validation", "optim/lr", "speed/images_s", "speed/step_s", "validation/dice",
        "validation/images",
    ]  # fmt: skip
    assert [(each.step, each.wall_time) for each in reader.Scalars("loss/train")] == [(2, 1002), (4, 1004), (6, 1006)]
    tensorboard.publish(str(folder), history(12), 12)
    reader.Reload()
    assert [each.step for each in reader.Scalars("loss/train")] == [2, 4, 6, 8, 10, 12]
    assert [each.step for each in reader.Scalars("loss/validation")] == [6, 12]
    assert len(list(folder.iterdir())) == 2


def test_the_same_look_again_writes_nothing_twice(tmp_path: Path):
    for _ in range(2):
        tensorboard.publish(str(tmp_path), history(6), 6)
    found = scalars(str(tmp_path))
    require_increasing(found)
    assert [step for step, _ in found["loss/train"]] == [2, 4, 6]


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_run_that_goes_on_has_each_step_once(where: str, tmp_path: Path, request: pytest.FixtureRequest):
    folder = str(tmp_path / "x") if where == "folder" else f"{request.getfixturevalue('s3')}/tensorboard/0"
    tensorboard.rewind(folder, 0)
    for step in (6, 12, 18):
        tensorboard.publish(folder, history(step), step)
    # It died before the checkpoints of 12 and 18 were there; steps are larger now, so looks are elsewhere.
    tensorboard.rewind(folder, 6)
    assert sorted(tensorboard.files_by_last_step(folder)) == [6]
    again = history(6) + history(15, start=7, worth=2.0)
    tensorboard.publish(folder, again, 15)
    tensorboard.publish(folder, again + history(20, start=16, worth=2.0), 20)
    found = scalars(folder)
    require_increasing(found)
    assert [step for step, _ in found["loss/train"]] == list(range(2, 21, 2))
    assert [value for step, value in found["loss/train"] if step > 6] == pytest.approx([2 / s for s in range(8, 21, 2)])


def test_steps_since_the_last_look_come_with_the_next_one(tmp_path: Path):
    tensorboard.publish(str(tmp_path), history(6), 6)
    # Kept at step 9, since the machine went; gone on from there: the history has 8, no file has it yet.
    tensorboard.rewind(str(tmp_path), 9)
    tensorboard.publish(str(tmp_path), history(12), 12)
    assert [step for step, _ in scalars(str(tmp_path))["loss/train"]] == [2, 4, 6, 8, 10, 12]


def test_files_of_others_stay(tmp_path: Path):
    storage.write_bytes(f"{tmp_path}/events.out.tfevents.1700000000.host", b"")
    tensorboard.publish(str(tmp_path), history(6), 6)
    tensorboard.rewind(str(tmp_path), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["events.out.tfevents.1700000000.host"]
