"""A command as it is sent to a cluster: its arguments as the job will read them there, and the files that go along."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.submission import visible_paths, working_tree


@dataclass(frozen=True)
class Request:
    """One command as it is sent."""

    verb: str
    arguments: list[str]
    """What follows the verb, as the job will read it."""
    root: Path
    """The working tree that goes along."""
    files: list[str]
    """The tree's files, relative to ``root``."""

    @property
    def entrypoint(self) -> str:
        """What the cluster runs, in its copy of the tree."""
        return shlex.join(["python", "-m", "jobs.cli", self.verb, *self.arguments])


def request_of(command: Any, options: dict[str, Any]) -> Request:
    """The command as the cluster will read it.

    Args:
        command: The command as Typer built it; its parameters say which options are places.
        options: Values of its parameters, by name.

    Raises:
        InputError: The config or a place is one that the cluster cannot see.
    """
    root = working_tree.root_of(Path.cwd())
    files = working_tree.files(root)
    arguments: list[str] = []
    for parameter in command.params:
        value = options.get(parameter.name)
        # Defaults are not written out: the job runs the same code, and finds the same ones.
        if value is None or value == parameter.default or value in ("", [], ()):
            continue
        if parameter.metavar == "CONFIG.yaml":
            value = visible_paths.require_visible_config(value, options.get("sets") or [], root, files)
        if parameter.param_type_name == "argument":
            arguments.append(str(value))
            continue
        flag = parameter.opts[0]
        if parameter.is_flag:
            arguments += [flag] if value else []
            continue
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.metavar in ("URI", "FILE.json"):
                text = _seen_from_root(text, root)
                visible_paths.require_visible(flag, text, files, written=parameter.name == "out")
            arguments += [flag, str(text)]
    return Request(command.name, arguments, root, files)


def _seen_from_root(place: str, root: Path) -> str:
    """A relative path below the tree's root as the job sees it, which runs in that root."""
    if not visible_paths.is_local(place):
        return place
    inside = os.path.relpath(Path(place).resolve(), root)
    return place if inside.startswith("..") else inside
