"""What the cluster does not have is refused with numbers."""

from pathlib import Path

import pytest
import ray

from pipeline.errors import InputError
from pipeline.runtime import resources
from pipeline.scoring import actor_pool


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What Ray says that there is."""
    there = {"CPU": 4.0, "object_store_memory": 1e9}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    return there


def test_consumers_may_not_take_every_cpu(cluster: dict[str, float]):
    resources.require_cpus(3, "3 workers")
    with pytest.raises(InputError, match="4 workers and 1 CPU for reading want 5 CPUs, the cluster has 4;"):
        resources.require_cpus(4, "4 workers")
    cluster["CPU"] = 1
    with pytest.raises(InputError, match="an actor .* want 2 CPUs, the cluster has 1;"):
        actor_pool.plan_actor_pool(10, None, None, 1.0)


def test_a_gpu_for_each_worker_or_none_at_all(cluster: dict[str, float]):
    assert not resources.claim_gpus(4)
    cluster["GPU"] = 4
    assert resources.claim_gpus(4)
    with pytest.raises(InputError, match="5 want a GPU each, the cluster has 4; set it to 4"):
        resources.claim_gpus(5)


def test_rows_on_their_way_fit_into_the_object_stores(cluster: dict[str, float]):
    resources.require_object_store(4.9e8, "batches")
    with pytest.raises(InputError, match="8 batches hold 0.51 GB on their way, .* have 1.00 GB, of which 50%"):
        resources.require_object_store(5.1e8, "8 batches")


def test_a_disk_is_not_filled(tmp_path: Path):
    resources.require_disk(str(tmp_path / "not/there/yet"), 1000, "3 images")
    with pytest.raises(InputError, match=r"3 images would take 1000000\.00 GB at .*, where .* GB are free"):
        resources.require_disk(str(tmp_path / "not/there/yet"), 1e15, "3 images")
    resources.require_disk("s3://bucket/x", 1e18, "stores that have no end")


def test_a_cluster_that_can_never_have_as_much_is_not_waited_for(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DUBITO_GROWS", "CPU=6, GPU=2")
    with pytest.raises(InputError, match="6 workers and 1 CPU for reading want 7 CPUs, the cluster has 6;"):
        resources.require_cpus(6, "6 workers")
    with pytest.raises(InputError, match=r"train.workers = 3 want a GPU each, the cluster has 2;"):
        resources.claim_gpus(3)


def test_how_far_a_cluster_grows_has_to_be_readable(cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DUBITO_GROWS", "GPU:4")
    with pytest.raises(InputError, match="DUBITO_GROWS = 'GPU:4': wanted .* such as CPU=64,GPU=4; mend it"):
        resources.wait_for_cluster()


def test_a_cluster_that_does_not_grow_is_taken_as_it_is(cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DUBITO_GROWS", raising=False)
    resources.wait_for_cluster(gpus=4)
    assert resources.claim_gpus(4) is False
