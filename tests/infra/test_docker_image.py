"""``infra/Dockerfile``: the tested versions, what the jobs import, non-root; what .dockerignore lets through."""

import ast
import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from infra import nodes

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "infra" / "Dockerfile").read_text("utf-8")
STEPS = [line for line in re.sub(r"\\\n", "", TEXT).splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def steps(kind: str) -> list[str]:
    return [step.removeprefix(f"{kind} ") for step in STEPS if step.startswith(f"{kind} ")]


def let_through(path: str) -> bool:
    """Whether .dockerignore sends a file to the builder: the last pattern that fits it or a folder of it decides."""
    parts, sent = path.split("/"), True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parents = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        deep = "**/" in line and any(fnmatch.fnmatch(part, pattern) for part in parts)
        same = [each for each in parents if each.count("/") == pattern.count("/")]
        if deep or any(fnmatch.fnmatch(each, pattern) for each in same):
            sent = line.startswith("!")
    return sent


def copied() -> list[str]:
    """Sources of every COPY, globs resolved to files of the project."""
    sources = [source for step in steps("COPY") for source in shlex.split(step)[:-1]]
    return [str(path.relative_to(ROOT)) for source in sources for path in sorted(ROOT.glob(source))]


def test_versions_and_labels_agree():
    version = PROJECT["project"]["version"]
    assert steps("ARG") == [f"VERSION={version}"]
    assert f"REGISTRY/{nodes.image()}" in TEXT
    assert nodes.image() == f"dubito:{version}"
    (label,) = steps("LABEL")
    assert 'image.version="${VERSION}"' in label
    assert f'image.licenses="{PROJECT["project"]["license"]}"' in label
    (base,) = steps("FROM")
    python = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert python is not None
    assert python[1] == PROJECT["project"]["requires-python"].removeprefix(">=")


def test_the_image_asks_for_what_the_project_asks_for(tmp_path: Path):
    (install,) = [step for step in steps("RUN") if "requirements.txt" in step]
    script = install.split('python -c "')[1].split('" >')[0]
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    extras = PROJECT["project"]["optional-dependencies"]
    assert done.stdout.splitlines() == [*PROJECT["project"]["dependencies"], *extras["demo"], *extras["aws"]]
    assert "pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt" in install


def test_the_image_runs_as_the_user_that_kubernetes_is_told():
    assert steps("USER") == [str(nodes.USER)]
    assert f"--uid {nodes.USER} ray" in TEXT
    assert STEPS.index(f"USER {nodes.USER}") > max(index for index, step in enumerate(STEPS) if step.startswith("RUN"))


@pytest.mark.parametrize("program", ["rsync", "openssh-client", "wget", "procps"])
def test_the_image_has_what_the_launcher_and_the_probes_call(program: str):
    assert any("apt-get install" in step and program in step for step in steps("RUN"))


def test_what_is_copied_is_there_and_let_through():
    sources = copied()
    assert {"pipeline", "jobs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(sources)
    for source in sources:
        files = [path for path in (ROOT / source).rglob("*") if path.is_file()] or [ROOT / source]
        for file in files:
            name = str(file.relative_to(ROOT))
            assert let_through(name) is ("__pycache__" not in name), name


@pytest.mark.parametrize(
    "name", [".git/config", ".venv/bin/python", "tests/conftest.py", "runs/x", "infra/k8s/secret.example.yaml", ".env"]
)
def test_nothing_else_is_sent_to_the_builder(name: str):
    assert not let_through(name)


def test_every_module_that_the_jobs_import_is_in_the_image():
    tops = {name.removesuffix(".*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    inside = {source.split("/")[0] for source in copied() if (ROOT / source).is_dir() or source.endswith(".py")}
    assert tops == inside
    for top in ("pipeline", "jobs"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                own = {name.split(".")[0] for name in names} & {"infra", "benchmarks", "tests"}
                assert own <= inside, f"{path} imports {own}"
    module = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text("utf-8"))["provider"]["module"]
    assert f"{module.rpartition('.')[0].replace('.', '/')}.py" in copied()
