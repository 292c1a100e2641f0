"""Where things are is written down and true: README's tree has the packages, each package's docstring its files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TREE = README.partition("## What is where")[2].partition("```\n")[2].partition("```")[0]
PACKAGES = sorted(
    path.parent for top in ("pipeline", "jobs", "benchmarks", "infra") for path in (ROOT / top).rglob("__init__.py")
)
DESCRIBED = [
    package
    for package in PACKAGES
    if package.relative_to(ROOT).parts[0] in ("pipeline", "jobs", "benchmarks") and package.name != "benchmarks"
]
"""Packages whose docstring has a line for each file."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def contents(package: Path) -> list[str]:
    """What a package's docstring must describe: the stems of its files, and its subpackages."""
    modules = [path.stem for path in package.glob("*.py") if path.name != "__init__.py"]
    return sorted([*modules, *(path.parent.name for path in package.glob("*/__init__.py"))])


def described(package: Path) -> list[str]:
    """What a package's docstring describes, by lines of the form ``stem: what it holds``."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    return sorted(re.findall(r"^(\w+): \S", docstring, re.MULTILINE))


@pytest.mark.parametrize("package", DESCRIBED, ids=name_of)
def test_a_package_describes_each_of_its_files(package: Path):
    missing = sorted(set(contents(package)) - set(described(package)))
    stale = sorted(set(described(package)) - set(contents(package)))
    assert not missing, f"{name_of(package)}/__init__.py: add a line 'name: what it holds' for {missing}"
    assert not stale, f"{name_of(package)}/__init__.py describes what is not there: {stale}"


def test_the_tree_has_one_line_a_package():
    # The indentation of a line says which folder it is in.
    listed, above = [], ""
    for indent, name in re.findall(r"^( *)(\w+)/", TREE, re.MULTILINE):
        above = "" if not indent else above
        listed.append(f"{above}/{name}" if indent else name)
        above = above or name
    assert len(listed) == len(set(listed)), "a package stands there twice"
    packages = {name_of(package) for package in PACKAGES}
    nested = {name for name in packages if name.count("/") > 1}  # described by the package that they are in
    assert packages - nested - set(listed) == set(), "add a line to the tree in README.md"
    assert [name for name in listed if not (ROOT / name).is_dir()] == []


def test_every_file_it_names_is_there():
    configs = re.findall(r"jobs/configs/\w+\.yaml", README)
    assert configs
    for name in [*configs, "CONTRIBUTING.md", "LICENSE", "ray_cluster.yaml"]:
        assert (ROOT / name).is_file(), name


def test_the_verbs_it_shows_exist():
    from typer.main import get_command

    from jobs.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    shown = set(re.findall(r"^dubito +(\w+)", README, re.MULTILINE))
    assert shown
    assert shown <= set(known)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_the_modules_and_programs_that_a_page_names_exist(page: str):
    text = (ROOT / page).read_text()
    programs = re.findall(r"python -m\s+((?:pipeline|jobs|infra|benchmarks)[.\w]*)", text)
    names = re.findall(r"`((?:pipeline|jobs|infra|benchmarks|tests)(?:/\w+)*(?:\.py|/))`", text)
    for name in programs:
        path = ROOT / name.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    for name in names:
        assert (ROOT / name).exists(), name
