"""Members that fail: taken up again, given up, counted; through real fits."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.runtime.progress import SilentSink
from pipeline.training import ensemble
from pipeline.training.member_scheduler import TrainMember
from pipeline.training.train_config import TrainConfig
from tests.support import tiny


@pytest.fixture(scope="module")
def squares(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    splits = {"train": range(12), "val": range(12, 16)}
    return tiny.make_squares(tmp_path_factory.mktemp("squares"), splits)


def config(data: str, out: Path, **sections: Any) -> TrainConfig:
    tree = {
        "task": "segmentation",
        "data": data,
        "out": str(out),
        "model": {"name": "unet", "width": 4, "depth": 2},
        "loss": {"cross_entropy": 1},
        "input": {"size": [32, 32]},
        "train": {"batch_size": 4, "steps": 2, "threads": 1},
        **sections,
    }
    return TrainConfig.parse(tree, "test")


def dies(folder: Path, times: dict[int, int]) -> TrainMember:
    """A training whose process is killed before it begins, ``times[seed]`` times; then the real one."""
    folder.mkdir()

    def train_member(run: Any) -> dict[str, Any]:
        from pipeline.training import ray_train

        seed = run.config["seed"]
        for attempt in range(times.get(seed, 0)):
            mark = folder / f"{seed}-{attempt}"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return ray_train.train_member(run)

    return train_member


def test_a_member_that_dies_twice_succeeds_and_one_that_dies_for_good_is_listed(squares: str, tmp_path: Path):
    train_member = dies(tmp_path / "marks", {0: 2, 1: 99})
    settings = config(squares, tmp_path / "out", ensemble={"min_members": 1, "retries": 2})
    bundle = ensemble.train_ensemble(settings, 2, resume=False, sink=SilentSink(), train_member=train_member)
    assert bundle.members == 1
    assert bundle.manifest["seeds"] == [0]
    assert [(member["member"], member["seed"]) for member in bundle.manifest["failed"]] == [(1, 1)]
    assert "died" in bundle.manifest["failed"][0]["error"] or "crashed" in bundle.manifest["failed"][0]["error"]
    assert sorted(path.name for path in (tmp_path / "marks").iterdir()) == ["0-0", "0-1", "1-0", "1-1", "1-2"]


def test_too_few_members_are_no_ensemble_and_what_was_done_is_kept(squares: str, tmp_path: Path):
    settings = config(squares, tmp_path / "out", ensemble={"retries": 0})
    with pytest.raises(Exception, match="died|crashed"):
        ensemble.train_ensemble(
            settings, 1, resume=False, sink=SilentSink(), train_member=dies(tmp_path / "marks", {0: 1})
        )
    with pytest.raises(InputError, match="unfinished run of the same inputs; add --resume"):
        ensemble.train_ensemble(settings, 1, resume=False, sink=SilentSink())
    with pytest.raises(InputError, match="--members 1: an ensemble needs at least 2"):
        ensemble.train_ensemble(
            config(squares, tmp_path / "x", ensemble={"min_members": 2}), 1, resume=False, sink=SilentSink()
        )
