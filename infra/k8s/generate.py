"""Write the manifests: ``python -m infra.k8s.generate``; with ``--check``, say which committed ones are stale."""

import argparse
import sys
from pathlib import Path

from infra.k8s import manifests

HERE = Path(__file__).resolve().parent


def stale(folder: Path = HERE) -> list[str]:
    """Paths below ``folder`` that are missing, differ from what would be written, or are written no more; sorted."""
    generated = manifests.files()
    committed = {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*.yaml")}
    return sorted(name for name in generated.keys() | committed.keys() if generated.get(name) != committed.get(name))


def write(folder: Path = HERE) -> list[str]:
    """Write what is stale, and remove what is written no more; returns the paths."""
    generated, changed = manifests.files(), stale(folder)
    for name in changed:
        path = folder / name
        if name in generated:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated[name], "utf-8")
        else:
            path.unlink()
    return changed


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code: 1 where ``--check`` finds stale files."""
    parser = argparse.ArgumentParser(prog="python -m infra.k8s.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is stale")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the manifests lie (default: beside this)")
    chosen = parser.parse_args(arguments)
    changed = stale(chosen.folder) if chosen.check else write(chosen.folder)
    for name in changed:
        print(f"{'stale' if chosen.check else 'wrote'} {name}")
    return 1 if chosen.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
