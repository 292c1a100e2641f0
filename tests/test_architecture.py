"""Imports point one way and in no circle, Ray and Kornia stay at the rim, files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("environment", "errors", "schema"),
    ("config", "storage"),
    ("runtime",),
    ("images",),
    ("datasets",),
    ("augment", "losses"),
    ("uncertainty",),
    ("metrics",),
    ("models",),
    ("tasks",),
    ("stream",),
    ("predictions",),
    ("scoring", "verify"),
    ("training",),
    ("retraining",),
    ("review",),
    ("report",),
)
"""Packages and loose files of ``pipeline``, lowest first. A package imports those of lower lines only."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIDEWAYS = {("environment", "errors"), ("schema", "errors")}
"""``errors`` is what everything, its own layer too, raises."""

RAY = {"runtime", "datasets", "stream", "scoring", "training", "verify"}
KORNIA = {"augment", "losses"}
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 70
MAX_FOLDER_FILES = 20
VAGUE_NAMES = frozenset("told said made found each own mine its there here given wanted known".split())
"""Words that name nothing: a variable is the noun that it holds (CONTRIBUTING)."""

FILES = sorted((ROOT / "pipeline").rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
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
    unit = unit_of(module)
    messages = []
    for name in imports(ast.parse(source), module, is_package):
        top, target = name.split(".")[0], unit_of(name)
        if top == "jobs":
            messages.append(f"{module} imports {name}: only jobs may import jobs")
        if top == "ray" and unit not in RAY:
            messages.append(f"{module} imports {name}: Ray is allowed in {sorted(RAY)} and jobs")
        if top == "kornia" and unit not in KORNIA:
            messages.append(f"{module} imports {name}: Kornia is allowed in {sorted(KORNIA)}")
        # Inside a package any file may import any other one, in no circle; and __version__ is no package.
        if unit is None or target in (None, unit) or (unit, target) in SIDEWAYS or target.startswith("__"):
            continue
        if target not in LEVEL:
            messages.append(f"{module} imports {name}: '{target}' has no layer; add it to LAYERS and to CONTRIBUTING")
        elif LEVEL[target] >= LEVEL.get(unit, -1):
            messages.append(f"{module} imports {name}: imports point down the layers only")
    return messages


def long_functions(tree: ast.AST) -> list[tuple[str, int]]:
    """(name, lines) of functions over the limit; decorators and docstring count."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]
    return [(name, lines) for name, lines in sizes if lines > MAX_FUNCTION_LINES]


def import_graph(files: Iterable[Path]) -> dict[str, set[str]]:
    """module -> the modules among ``files`` that it imports, at its top or lazily inside its functions."""
    modules = {module_of(path): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text("utf-8"))
        graph[module] = set()
        for name in imports(tree, module, path.name == "__init__.py"):
            # A name is a module, or something that stands in one: then the module is what was imported.
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                graph[module].add(target)
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in the order in which they import each other; empty where there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for target in sorted(graph[module]):
            if circle := visit(target, [*path, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), [])


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of each variable and each parameter of a file, where it is bound."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path):
    unit = unit_of(module_of(path))
    assert unit is None or unit in LEVEL, f"'{unit}' has no layer; add it to LAYERS and to CONTRIBUTING"
    assert broken_rules(path.read_text("utf-8"), module_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", EVERY_FILE, ids=module_of)
def test_files_and_functions_are_small(path: Path):
    text = path.read_text("utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{module_of(path)} has {lines} lines, limit {MAX_FILE_LINES}; split it"
    assert long_functions(ast.parse(text)) == []


def test_no_files_import_each_other_in_a_circle():
    assert " -> ".join(find_circle(import_graph(EVERY_FILE))) == ""


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_can_be_taken_in_at_a_glance(folder: Path):
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MAX_FOLDER_FILES, (
        f"{len(files)} files in {folder.name}/: make a package of those that belong together"
    )


def test_variables_say_what_they_hold():
    vague = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted({*FILES, *(ROOT / "jobs").rglob("*.py")})
        for name, line in bound_names(ast.parse(path.read_text("utf-8")))
        if name in VAGUE_NAMES or name.endswith("_module")
    ]
    assert not vague, "name the thing itself:\n" + "\n".join(vague)


def test_the_package_itself_imports_nothing():
    assert list(imports(ast.parse((ROOT / "pipeline/__init__.py").read_text("utf-8")), "pipeline")) == []


def test_infra_stands_alone_but_for_the_list_of_verbs():
    outside = []
    for path in sorted((ROOT / "infra").rglob("*.py")):
        names = imports(ast.parse(path.read_text("utf-8")), module_of(path), path.name == "__init__.py")
        outside += [(module_of(path), name) for name in names if name.split(".")[0] in ("pipeline", "jobs")]
    assert outside == [("infra.k8s.verbs", "jobs.cli.app")]


@pytest.mark.parametrize(
    ("source", "module", "is_package", "word"),
    [
        ("from pipeline import training", "pipeline.losses.dice", False, "down the layers"),
        ("import pipeline.models.bundle", "pipeline.images.boxes", False, "down the layers"),
        ("def f():\n    from pipeline.models.bundle import stage", "pipeline.augment.draw", False, "down the layers"),
        ("from ..training import loop", "pipeline.losses.dice", False, "down the layers"),
        ("from . import training", "pipeline.schema", False, "down the layers"),
        ("from ..models import unet", "pipeline.losses", True, "down the layers"),
        ("import ray.data", "pipeline.losses.dice", False, "Ray is allowed"),
        ("from kornia import losses", "pipeline.training.loop", False, "Kornia is allowed"),
        ("from jobs.cli import main", "pipeline.training.loop", False, "only jobs"),
        ("from pipeline import mystery", "pipeline.training.loop", False, "no layer"),
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
        ("from pipeline import schema, storage\nimport torch", "pipeline.models.bundle"),
        ("from pipeline.errors import InputError", "pipeline.config"),
        ("import ray\nfrom ray import data", "pipeline.datasets.ingest"),
        ("import kornia", "pipeline.augment.geometry"),
    ],
)
def test_an_allowed_import_passes(source: str, module: str):
    assert broken_rules(source, module) == []


def test_a_long_function_is_found():
    body = "\n".join(f"    x{line} = {line}" for line in range(MAX_FUNCTION_LINES))
    assert long_functions(ast.parse(f"def f():\n{body}\n")) == [("f", MAX_FUNCTION_LINES + 1)]
    assert long_functions(ast.parse(f"def f():\n{body.removesuffix(body.splitlines()[-1])}\n")) == []


WITHOUT_TORCH = (
    "pipeline.datasets.dataset",
    "pipeline.datasets.diff",
    "pipeline.datasets.image_fetch",
    "pipeline.datasets.ingest",
    "pipeline.datasets.shard_writer",
    "pipeline.predictions",
    "pipeline.retraining.registry",
    "pipeline.runtime.memory",
    "pipeline.runtime.ray_tasks",
    "pipeline.scoring.actor_pool",
    "pipeline.scoring.crash_guard",
    "pipeline.scoring.unit_reader",
    "pipeline.stream.run_stream",
    "pipeline.stream.validation",
    "pipeline.verify",
)
"""What reading tasks, and commands that only look, import: torch costs each of their processes two seconds."""


def test_reading_tasks_import_no_torch():
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    command = [sys.executable, "-c", program, *WITHOUT_TORCH]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
