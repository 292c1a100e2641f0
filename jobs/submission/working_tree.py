"""The working tree as it is sent to a cluster: what git would track, in one zip."""

import hashlib
import os
import subprocess
import tempfile
import zipfile
from pathlib import Path

from pipeline.errors import InputError

MAX_BYTES = 100 * 2**20
"""Largest zip: a Ray head takes no larger upload."""
NUM_LARGEST = 3
"""So many of the largest files are named when the zip is too large."""
_EXCLUDED_FOLDERS = {".git", ".venv", "venv", "__pycache__", "node_modules"}
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in the zip, which thus depends on names and contents alone: Ray sends the same zip only once."""


def root_of(folder: Path) -> Path:
    """The git work tree around ``folder``; ``folder`` itself where there is none."""
    output = _git(folder, "rev-parse", "--show-toplevel")
    return Path(output.strip()).resolve() if output else folder.resolve()


def files(root: Path) -> list[str]:
    """Paths of the tree's files, relative to ``root``, sorted: tracked or not, but not ignored by git.

    Without git, all but caches and virtual environments.
    """
    listed = _git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed is None:
        listed = _git_without_repository(root)
    if listed is None:
        paths = [path for path in root.rglob("*") if not _EXCLUDED_FOLDERS & set(path.relative_to(root).parts)]
        names = [str(path.relative_to(root)) for path in paths]
    else:
        names = [name for name in listed.split("\0") if name]
    return sorted(name for name in set(names) if (root / name).is_file())


def _git(folder: Path, *arguments: str, git_dir: str | None = None) -> str | None:
    """Output of git; None where it fails or is not installed."""
    place = ["--git-dir", git_dir, "--work-tree", "."] if git_dir else []
    try:
        done = subprocess.run(["git", *place, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _git_without_repository(root: Path) -> str | None:
    """Files of a folder that is no repository, as git would list them: its .gitignore files count all the same."""
    with tempfile.TemporaryDirectory() as empty:
        if _git(root, "init", "--quiet", "--bare", empty) is None:
            return None
        return _git(root, "ls-files", "--others", "--exclude-standard", "-z", git_dir=empty)


def pack(root: Path, names: list[str], target: Path) -> str:
    """Zip the files ``names`` of the tree into ``target``; returns the sha256 of the zip.

    Raises:
        InputError: The zip is larger than ``MAX_BYTES``; the largest files are named.
    """
    sizes = {name: (root / name).stat().st_size for name in names}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (0o755 if os.access(root / name, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (root / name).read_bytes())
            if target.stat().st_size > MAX_BYTES:  # refused below; the rest would only take time
                break
    size = target.stat().st_size
    if size > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:NUM_LARGEST]
        named = ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in largest)
        raise InputError(
            f"the working tree '{root}' packs to more than {MAX_BYTES / 1e6:.0f} MB, which is what a Ray head takes; "
            f"keep data out of it or name it in .gitignore (the largest: {named})"
        )
    return hashlib.sha256(target.read_bytes()).hexdigest()
