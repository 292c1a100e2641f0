"""The README stays true: its tree names every module, its configs exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tree_names_every_module():
    modules = [path for top in ("pipeline", "jobs") for path in (ROOT / top).rglob("*.py") if path.name[0] != "_"]
    missing = [
        str(path.relative_to(ROOT))
        for path in modules
        if path.name not in README and not re.search(rf"\b{path.stem}\b", README)
    ]
    assert len(modules) > 40
    assert not missing, f"add to the tree in README.md: {missing}"


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
