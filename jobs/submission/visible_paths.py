"""Paths that a cluster cannot see are refused before anything is sent to it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

PLACE_KEYS = (
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
"""Keys of configs whose values are paths or URIs."""
_WRITTEN_KEYS = ("out", "registry", "work")
"""Those of the keys that name what a job writes."""


def is_local(value: str) -> bool:
    """Whether ``value`` is a relative path of this machine."""
    return "://" not in value and not value.startswith(("/", "~", "wheel:", "timm:"))


def require_visible(name: str, value: str, tree: Iterable[str], *, written: bool) -> None:
    """Refuse a place that a job on another machine cannot see.

    Args:
        name: As the person wrote it: ``--data``, or a config's key.
        value: A URI or a path.
        tree: Files that are sent with the job, which can read them.
        written: Whether the job writes there: what it wrote into its copy of the tree would be lost.

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
    """Dotted key -> value, of all paths and URIs in a config."""
    places: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            places |= places_of(value, f"{prefix}{key}.")
        elif key in PLACE_KEYS and isinstance(value, str):
            places[f"{prefix}{key}"] = value
    return places


def require_visible_config(path: str, sets: list[str], root: Path, tree: list[str]) -> str:
    """The config's path inside the tree, after a check of every path that it names.

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
        require_visible(name, value, tree, written=name.rsplit(".", 1)[-1] in _WRITTEN_KEYS)
    return inside
