"""Environment variables: read in one file, which names and checks them all."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import environment
from pipeline.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "pipeline" / "environment.py"


def uses_of_the_environment(source: str) -> Iterator[int]:
    """Lines that name ``os.environ``, ``os.getenv`` or their like, to read or to write."""
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None)
        if name in ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"):
            yield getattr(node, "lineno", 0)


def test_one_file_reads_the_environment():
    files = [path for top in ("pipeline", "jobs") for path in sorted((ROOT / top).rglob("*.py")) if path != HOME]
    offenders = {str(path.relative_to(ROOT)): [*uses_of_the_environment(path.read_text("utf-8"))] for path in files}
    assert {path: lines for path, lines in offenders.items() if lines} == {}
    assert list(uses_of_the_environment("import os\nfrom os import getenv\nos.environ['x'] = '1'")) == [2, 3]


def test_every_variable_is_documented_and_its_name_is_written_once():
    names = {value for name, value in vars(environment).items() if name.isupper() and isinstance(value, str)}
    names -= {environment.JSON_LOG}
    assert {name for name in names if f"``{name}``" not in (environment.__doc__ or "")} == set()
    for top in ("pipeline", "jobs"):
        for path in (ROOT / top).rglob("*.py"):
            if path != HOME:
                assert not re.findall(r'^[^#]*= "(DUBITO_[A-Z_]+)"', path.read_text("utf-8"), re.M), path


def test_what_is_not_set_has_its_default(monkeypatch: pytest.MonkeyPatch):
    for name in ("STORAGE_PATIENCE_S", "LOG_FORMAT", "RUN_ID", "CLUSTER_LIMITS", "PINNED_VERSIONS", "RAY_ADDRESS"):
        monkeypatch.delenv(getattr(environment, name), raising=False)
    assert environment.storage_patience_s(7.0) == 7.0
    assert not environment.wants_json_log()
    assert environment.run_id() is None
    assert environment.cluster_limits() == {}
    assert environment.pinned_versions() == {}
    assert not environment.has_ray_address()


def test_what_is_set_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(environment.STORAGE_PATIENCE_S, "2.5")
    monkeypatch.setenv(environment.CLUSTER_LIMITS, "CPU=64, GPU=4,")
    monkeypatch.setenv(environment.PINNED_VERSIONS, '{"torch": "2.11.0"}')
    assert environment.storage_patience_s(7.0) == 2.5
    assert environment.cluster_limits() == {"CPU": 64.0, "GPU": 4.0}
    assert environment.pinned_versions() == {"torch": "2.11.0"}


@pytest.mark.parametrize(
    ("variable", "value", "read"),
    [
        (environment.STORAGE_PATIENCE_S, "two minutes", lambda: environment.storage_patience_s(1.0)),
        (environment.CLUSTER_LIMITS, "many", environment.cluster_limits),
        (environment.CLUSTER_LIMITS, "CPU=many", environment.cluster_limits),
        (environment.PINNED_VERSIONS, "torch==2", environment.pinned_versions),
        (environment.PINNED_VERSIONS, '["torch"]', environment.pinned_versions),
    ],
)
def test_what_cannot_be_read_is_named(variable: str, value: str, read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable} = '{re.escape(value)}': wanted"):
        read()


def test_the_special_endpoint_of_s3_comes_first_and_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://one",
        "AWS_ENDPOINT_URL": "http://two",
        "AWS_DEFAULT_REGION": "eu-1",
        "AWS_ACCESS_KEY_ID": "hidden-1",
        "AWS_SECRET_ACCESS_KEY": "hidden-2",
        "AWS_SESSION_TOKEN": "hidden-3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_REGION", raising=False)
    access = environment.s3_access()
    assert (access.endpoint, access.region, access.key) == ("http://one", "eu-1", "hidden-1")
    assert "hidden" not in repr(access)


def test_a_submitted_job_takes_along_what_is_dubitos_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv(environment.REGISTRY, "s3://bucket/registry")
    variables = environment.travelling()
    assert variables[environment.REGISTRY] == "s3://bucket/registry"
    assert all(name.startswith("DUBITO_") for name in variables)
