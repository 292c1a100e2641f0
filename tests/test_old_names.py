"""No import and no string names a module by the path that it had before the modules moved into packages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import imports, module_of

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests/data"
OLD_FILES = (DATA / "paths_before_the_move.txt").read_text().split()
"""Files that are not where they were: ``pipeline/score.py`` and so on."""
TOPS = (".ci", "benchmarks", "infra", "jobs", "pipeline", "tests")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ""}


def exists_today(dotted: str) -> bool:
    """Whether a dotted name is a module or a package now: ``pipeline.storage`` was a file, and is a package."""
    path = ROOT / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


OLD_MODULES = sorted(dotted for dotted in (module_of(ROOT / file) for file in OLD_FILES) if not exists_today(dotted))
"""Dotted names that mean nothing today: ``pipeline.score``."""


def pattern(names: list[str], after: str) -> re.Pattern[str]:
    """Any of these names, as a whole: not within a longer path."""
    return re.compile(rf"(?<![\w./])(?:{'|'.join(map(re.escape, names))}){after}")


FILES = pattern(OLD_FILES, r"\b")
MODULES = pattern(OLD_MODULES, r"(?!\w)")


def texts() -> Iterator[Path]:
    """Everything that people wrote in this repository."""
    below = (path for top in TOPS for path in (ROOT / top).rglob("*"))
    for path in [*ROOT.glob("*"), *sorted(below)]:
        if path.is_file() and path.suffix in SUFFIXES and DATA not in path.parents and "__pycache__" not in path.parts:
            yield path


def old_names(text: str, module: str | None = None, is_package: bool = False) -> list[str]:
    """The old paths that a text names; of Python source (``module``) also those that it imports by parts."""
    found = [match.group() for match in [*FILES.finditer(text), *MODULES.finditer(text)]]
    if module is not None:
        # ``from pipeline import score`` does not hold "pipeline.score".
        found += [name for name in imports(ast.parse(text), module, is_package) if MODULES.match(name)]
    return sorted(set(found))


def test_nothing_names_an_old_path():
    offenders = {}
    for path in texts():
        if path == Path(__file__):
            continue
        text = path.read_text("utf-8")
        module = module_of(path) if path.suffix == ".py" else None
        if names := old_names(text, module, path.name == "__init__.py"):
            offenders[str(path.relative_to(ROOT))] = names
    assert offenders == {}


def test_every_program_that_is_named_can_be_run():
    unknown = {}
    for path in texts():
        for name in re.findall(
            r"python3? -m\s+((?:jobs|infra|benchmarks|pipeline)(?:\.\w+)+)", path.read_text("utf-8")
        ):
            file = ROOT / name.replace(".", "/")
            source = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
            if not source.is_file() or "__main__" not in source.name + source.read_text("utf-8"):
                unknown[str(path.relative_to(ROOT))] = name
    assert unknown == {}


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("see pipeline/score.py", None),
        ("`pipeline.telemetry.Sink`", None),
        ("python -m " + "benchmarks.feed --small", None),
        ("import pipeline.bundle", "pipeline.models.unet"),
        ("from pipeline import bundle", "pipeline.models.unet"),
        ("def f():\n    from .. import telemetry", "pipeline.models.unet"),
        ("patch('pipeline.tasks.rows.decode')", "tests.test_x"),
    ],
)
def test_an_old_name_is_found(text: str, module: str | None):
    assert len(old_names(text, module)) == 1


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("see pipeline/scoring/job.py and benchmarks/speed/predict.py", None),
        ("pipeline.storage, pipeline.predictions and pipeline.stream are packages now", None),
        ("from pipeline import predictions, storage", "pipeline.models.unet"),
        ("from pipeline.models import bundle", "pipeline.scoring.job"),
    ],
)
def test_a_name_of_today_passes(text: str, module: str | None):
    assert old_names(text, module) == []
