"""Actors of a scoring job: how many there are, and that nothing of them is left after it."""

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.runtime.progress import SilentSink
from pipeline.scoring import actor_pool
from tests.support.scoring_cases import folder_of, logging_scorer, predict, score


def test_one_actor_an_image_where_there_is_little_to_do(ray_local: None):
    assert int(ray.cluster_resources()["CPU"]) == 8
    assert actor_pool.plan_actor_pool(1, None, None, 8).size == 1
    assert actor_pool.plan_actor_pool(100, None, None, 8).size == 3
    assert actor_pool.plan_actor_pool(100, 2, 5, 8) == actor_pool.ActorPool(2, 2, 0, threads=1, calls=5)
    assert actor_pool.plan_actor_pool(3, 2, 5, 8) == actor_pool.ActorPool(2, 2, 0, threads=5, calls=1)


def test_a_pool_leaves_a_cpu_to_the_readers_whatever_others_hold(ray_local: None):
    for free in (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.5, 8.0):
        pool = actor_pool.plan_actor_pool(100, 4, None, free)
        assert pool.size == 1 or pool.size * pool.cpus + 1 <= free, free


def processes(name: str) -> set[str]:
    """Folders in /proc of Ray's processes of that name."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                found.add(folder.name)
    return found


def test_no_process_of_a_job_outlives_it(tmp_path: Path, unet: str, ray_local: None):
    before, seen = processes("StartCounter"), set()

    class Looks(SilentSink):
        def update(self, *args: Any, **kwargs: Any) -> None:
            seen.update(processes("StartCounter") - before)

    score(unet, folder_of(tmp_path / "images", 5), sink=Looks())
    assert seen, "the test looks for a name that no process has"
    deadline = time.monotonic() + 20
    while processes("StartCounter") & seen and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes("StartCounter") & seen


def test_a_failed_run_gives_its_cpus_back_even_while_its_error_is_kept(tmp_path: Path, data: str, unet: str):
    scorer_class = logging_scorer(tmp_path / "log", allowed=0)
    with pytest.raises(Exception, match="power cut") as kept:
        predict(unet, data, str(tmp_path / "p"), actors=1, scorer_class=scorer_class)
    assert actor_pool.free_cpus() == ray.cluster_resources()["CPU"]
    assert "power cut" in str(kept.value)
