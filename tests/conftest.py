"""Shared fixtures: one S3 server and one local Ray for the whole session, and the real images where present."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "DUBITO_STORAGE_PATIENCE_S": "5",
    }
)
torch.set_num_threads(1)
# How long an example takes says more of the other processes of this machine than of the code.
hypothesis.settings.register_profile(
    "dubito", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("dubito")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray, whose processes take all cores: such tests run one by one, the others side by side."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()) or "cluster" in item.path.parts:
            item.add_marker("ray")


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Folder of the real images; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the real images are not beside the project ({SHARED.name} folder absent)")
    return SHARED


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A private S3 server; yields ``s3://<bucket>``. Its endpoint and keys are in the environment."""
    from infra.local.s3_server import s3_server
    from pipeline import storage

    with s3_server() as server:
        names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
        values = (server["endpoint"], server["key"], server["secret"], "us-east-1")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(dict(zip(names, values, strict=True)))
        filesystem, _ = storage.generic("s3://bucket")
        filesystem.mkdir("dubito-tests")
        yield "s3://dubito-tests"
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def ray_local(s3: str) -> Iterator[None]:
    """One local Ray; it starts after the S3 server, so that its workers inherit endpoint and keys."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 60
    yield
    ray.shutdown()
