"""The versions that a job was written against: taken where it is submitted, checked where it runs."""

import re
from importlib import metadata
from pathlib import Path

from pipeline import environment
from pipeline.errors import InputError

CONSTRAINTS = "constraints.txt"
MAX_SHOWN = 5
_NAME = re.compile(r"^[A-Za-z0-9._-]+")


def versions_of(root: Path) -> dict[str, str]:
    """Package -> version, of each direct requirement: the pinned one of ``constraints.txt``, else the installed one."""
    file = root / CONSTRAINTS
    pinned = _constraints(file.read_text("utf-8")) if file.is_file() else {}
    return {name: pinned.get(name) or metadata.version(name) for name in direct_requirements()}


def direct_requirements() -> list[str]:
    """Names of the packages that dubito requires itself, those of extras left out."""
    lines = metadata.requires("dubito") or []
    return sorted({_normalised(match[0]) for line in lines if "extra ==" not in line and (match := _NAME.match(line))})


def _normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints(text: str) -> dict[str, str]:
    """Package -> version, of the lines ``package==version``."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {_normalised(name): version.strip() for name, _, version in pairs}


def require_pinned_versions() -> None:
    """Refuse to run on other versions than those that this job was submitted with, if it was.

    Raises:
        InputError: Some differ; ``MAX_SHOWN`` of them at most are named.
    """
    versions = {name: (version, _installed(name)) for name, version in environment.pinned_versions().items()}
    # A local label such as +cu130 says how the same version was built.
    different = {name: pair for name, pair in versions.items() if pair[0].split("+")[0] != pair[1].split("+")[0]}
    if different:
        pairs = list(different.items())[:MAX_SHOWN]
        first = ", ".join(f"{name} {installed} instead of {pinned}" for name, (pinned, installed) in pairs)
        more = f" and {len(different) - MAX_SHOWN} more" if len(different) > MAX_SHOWN else ""
        raise InputError(
            f"the cluster has {first}{more}; build its image anew from constraints.txt (infra/Dockerfile), submit with "
            "--environment install, or with --environment any to run all the same"
        )


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
