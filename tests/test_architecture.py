"""Imports point one way, Ray and Kornia stay at the rim, files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("errors", "schema", "config", "patience", "flags", "ledger"),
    ("storage", "boxes", "telemetry", "gauges", "seal"),
    ("buffers", "preflight", "lines", "events"),
    ("jpeg",),
    ("decode", "uncertainty"),
    ("clusters", "device", "device_decode", "lanes", "batch_size", "folding", "pace"),
    ("formats", "augment", "models", "losses", "calibration", "metrics", "optim", "views"),
    ("splits", "shard_reader", "referenced"),
    ("shards",),
    ("manifest",),
    ("datasets", "tasks", "bundle"),
    ("framed",),
    ("stream", "meters", "rows"),
    ("predict", "predictions", "checkpoint", "recipe", "units", "unit_reader", "pools", "journal"),
    ("feed", "restarts"),
    ("loop",),
    ("train", "score"),
    ("evaluate", "calibrate", "verify", "exams", "changes", "drift", "judge", "lock"),
    ("ensemble", "registry", "review", "report"),
    ("retrain",),
)
"""Modules and packages of ``pipeline``, lowest first: DESIGN, section 1; helpers stand below their room."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIDEWAYS = {("schema", "errors"), ("config", "errors")}
"""``errors`` is what everything, its own layer too, raises."""

RAY = {
    "telemetry",
    "gauges",
    "datasets",
    "stream",
    "predictions",
    "pools",
    "train",
    "score",
    "evaluate",
    "calibrate",
    "ensemble",
}
RAY |= {"verify", "framed", "preflight", "restarts"}
KORNIA = {"augment", "losses"}
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 70

FILES = sorted((ROOT / "pipeline").rglob("*.py"))
EVERY_FILE = sorted(path for top in ("pipeline", "jobs", "infra") for path in (ROOT / top).rglob("*.py"))


def unit_of(module: str) -> str | None:
    """``pipeline.losses.assign`` -> ``losses``; None for other packages and for ``pipeline`` itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


def module_of(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Full names of everything imported anywhere in a file, lazy imports inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            keep = len(parents) - node.level + (1 if is_package else 0)
            base = [*parents[:keep], *filter(None, [node.module])] if node.level else [node.module or ""]
            # ``from pipeline import storage`` imports a module; ``from pipeline.storage import join`` a name.
            yield from (".".join([*base, alias.name]) for alias in node.names)


def broken_rules(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the imports of one file of ``pipeline`` break."""
    own, found = unit_of(module), []
    for name in imports(ast.parse(source), module, is_package):
        top, other = name.split(".")[0], unit_of(name)
        if top == "jobs":
            found.append(f"{module} imports {name}: only jobs may import jobs")
        if top == "ray" and own not in RAY:
            found.append(f"{module} imports {name}: Ray is allowed in {sorted(RAY)} and jobs")
        if top == "kornia" and own not in KORNIA:
            found.append(f"{module} imports {name}: Kornia is allowed in {sorted(KORNIA)}")
        if other is None or other == own or own is None or (own, other) in SIDEWAYS or other.startswith("__"):
            continue
        if other not in LEVEL:
            found.append(f"{module} imports {name}: '{other}' has no layer; add it to LAYERS and to DESIGN")
        elif LEVEL[other] >= LEVEL.get(own, -1):
            found.append(f"{module} imports {name}: imports point down the layers only")
    return found


def long_functions(tree: ast.AST) -> list[tuple[str, int]]:
    """(name, lines) of functions over the limit; decorators and docstring count."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]
    return [(name, lines) for name, lines in sizes if lines > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path):
    own = unit_of(module_of(path))
    assert own is None or own in LEVEL, f"'{own}' has no layer; add it to LAYERS and to DESIGN"
    assert broken_rules(path.read_text("utf-8"), module_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", EVERY_FILE, ids=module_of)
def test_files_and_functions_are_small(path: Path):
    text = path.read_text("utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{module_of(path)} has {lines} lines, limit {MAX_FILE_LINES}; split it"
    assert long_functions(ast.parse(text)) == []


def test_the_package_itself_imports_nothing():
    assert list(imports(ast.parse((ROOT / "pipeline/__init__.py").read_text("utf-8")), "pipeline")) == []


def test_infra_stands_alone_but_for_the_list_of_verbs():
    found = []
    for path in sorted((ROOT / "infra").rglob("*.py")):
        names = imports(ast.parse(path.read_text("utf-8")), module_of(path), path.name == "__init__.py")
        found += [(module_of(path), name) for name in names if name.split(".")[0] in ("pipeline", "jobs")]
    assert found == [("infra.k8s.verbs", "jobs.cli.app")]


@pytest.mark.parametrize(
    ("source", "module", "is_package", "word"),
    [
        ("from pipeline import train", "pipeline.losses.dice", False, "down the layers"),
        ("import pipeline.storage", "pipeline.boxes", False, "down the layers"),
        ("def f():\n    from pipeline.bundle import write", "pipeline.optim", False, "down the layers"),
        ("from ..train import fit", "pipeline.losses.dice", False, "down the layers"),
        ("from . import train", "pipeline.boxes", False, "down the layers"),
        ("from ..models import unet", "pipeline.losses", True, "down the layers"),
        ("import ray.data", "pipeline.losses.dice", False, "Ray is allowed"),
        ("from kornia import losses", "pipeline.train", False, "Kornia is allowed"),
        ("from jobs.cli import main", "pipeline.train", False, "only jobs"),
        ("from pipeline import mystery", "pipeline.train", False, "no layer"),
    ],
)
def test_a_broken_rule_is_found(source: str, module: str, is_package: bool, word: str):
    (message,) = broken_rules(source, module, is_package)
    assert word in message


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from pipeline.losses.segmentation import dice", "pipeline.losses.detection"),
        ("from .segmentation import dice", "pipeline.losses.detection"),
        ("from pipeline import schema, storage\nimport torch", "pipeline.bundle"),
        ("from pipeline.errors import InputError", "pipeline.config"),
        ("import ray\nfrom ray import data", "pipeline.datasets"),
        ("import kornia", "pipeline.augment"),
    ],
)
def test_an_allowed_import_passes(source: str, module: str):
    assert broken_rules(source, module) == []


def test_a_long_function_is_found():
    body = "\n".join(f"    x{line} = {line}" for line in range(MAX_FUNCTION_LINES))
    assert long_functions(ast.parse(f"def f():\n{body}\n")) == [("f", MAX_FUNCTION_LINES + 1)]
    assert long_functions(ast.parse(f"def f():\n{body.removesuffix(body.splitlines()[-1])}\n")) == []


WITHOUT_TORCH = (
    "pipeline.unit_reader",
    "pipeline.stream",
    "pipeline.registry",
    "pipeline.verify",
    "pipeline.datasets",
    "pipeline.predictions",
    "pipeline.shards",
    "pipeline.referenced",
    "pipeline.restarts",
    "pipeline.pools",
)
"""What reading tasks, and commands that only look, import: torch costs each of their processes two seconds."""


def test_reading_tasks_import_no_torch():
    program = "import sys, importlib\nimportlib.import_module(sys.argv[1])\nsys.exit('torch' in sys.modules)"
    started = [(name, subprocess.Popen([sys.executable, "-c", program, name], cwd=ROOT)) for name in WITHOUT_TORCH]
    assert [name for name, process in started if process.wait(120) != 0] == []
