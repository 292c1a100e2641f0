"""The versions that a job was written against: taken where it is submitted, checked where it runs."""

import re
from importlib import metadata
from pathlib import Path

from pipeline import environment
from pipeline.errors import InputError

CONSTRAINTS = "constraints.txt"
SHOWN = 5
_NAME = re.compile(r"^[A-Za-z0-9._-]+")


def wanted(root: Path) -> dict[str, str]:
    """Version of each package that dubito asks for itself: of ``constraints.txt`` in ``root``, else those here."""
    file = root / CONSTRAINTS
    pinned = _constraints(file.read_text("utf-8")) if file.is_file() else {}
    return {name: pinned.get(name) or metadata.version(name) for name in direct()}


def direct() -> list[str]:
    """Names of the packages that dubito asks for itself, extras left out."""
    lines = metadata.requires("dubito") or []
    return sorted({_plain(found[0]) for line in lines if "extra ==" not in line and (found := _NAME.match(line))})


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints(text: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {_plain(name): version.strip() for name, _, version in pairs}


def check() -> None:
    """Refuse to run on other versions than those that were submitted, if any were.

    Raises:
        InputError: They differ; all that differ are named, up to ``SHOWN``.
    """
    found = {name: (version, _installed(name)) for name, version in environment.pinned_versions().items()}
    # A local label such as +cu130 says how the same version was built.
    other = {name: pair for name, pair in found.items() if pair[0].split("+")[0] != pair[1].split("+")[0]}
    if other:
        first = ", ".join(f"{name} {there} instead of {here}" for name, (here, there) in list(other.items())[:SHOWN])
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise InputError(
            f"the cluster has {first}{more}; build its image anew from constraints.txt (infra/Dockerfile), submit with "
            "--environment install, or with --environment any to run all the same"
        )


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
