"""What can be refused before anything is sent to a cluster: paths that it cannot see."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

OF_CONFIG = (
    "data",
    "out",
    "registry",
    "recipe",
    "test",
    "work",
    "images",
    "labels",
    "splits",
    "reference",
    "recent",
    "weights",
)
"""Keys of configs whose values are places."""
_WRITTEN = ("out", "registry", "work")
"""Places that a job writes to."""


def is_local(value: str) -> bool:
    """Whether ``value`` is a relative path of this machine."""
    return "://" not in value and not value.startswith(("/", "~", "wheel:", "timm:"))


def place(name: str, value: str, tree: Iterable[str], *, written: bool) -> None:
    """Refuse a place that a job on another machine cannot see.

    Args:
        name: As the person wrote it: ``--data``, or a config's key.
        value: A URI or a path.
        tree: Files that travel with the job; what lies among them can be read there.
        written: Whether the job writes there: what it wrote into the travelled tree would be lost.

    Raises:
        InputError: A relative path.
    """
    if not value or not is_local(value):
        return
    path = Path(value).as_posix().removeprefix("./")
    if not written and any(file == path or file.startswith(path + "/") for file in tree):
        return
    what = "what the job writes there would be lost" if written else "it is not in the working tree that travels"
    raise InputError(
        f"{name} = '{value}' is a path of this machine ({what}); give an s3:// or gs:// URI, or an absolute path "
        "that every node of the cluster sees"
    )


def places_of(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The places that a config names: ``{dotted key: value}``."""
    out: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            out |= places_of(value, f"{prefix}{key}.")
        elif key in OF_CONFIG and isinstance(value, str):
            out[f"{prefix}{key}"] = value
    return out


def config(path: str, sets: list[str], root: Path, tree: list[str]) -> str:
    """The config's path inside the tree, once all places that it names were looked at.

    Raises:
        InputError: It is not part of the tree, or names a place that the cluster cannot see.
    """
    from pipeline.config import load

    inside = os.path.relpath(Path(path).resolve(), root)
    settings = load(path, sets)
    if inside not in tree:
        raise InputError(
            f"config '{path}' does not travel with the working tree '{root}' (outside of it, or ignored by git); "
            "put it there"
        )
    for name, value in places_of(settings).items():
        place(name, value, tree, written=name.rsplit(".", 1)[-1] in _WRITTEN)
    return inside
