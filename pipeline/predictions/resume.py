"""Finished unit files of earlier attempts that a new one adopts: compared with the plan, a group of units at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from pipeline import storage
from pipeline.predictions.unit_file import UnitFile, adoptable, unit_number

THREADS = 16
"""Files read at the same time."""
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""``map``, or what does the same elsewhere."""


class AdoptableUnits(Protocol):
    """Neighbouring units of a plan whose rows come from one place; few enough to hold all their image_ids."""

    @property
    def numbers(self) -> range:
        """The units' numbers."""
        ...

    def image_ids(self) -> Mapping[int, pa.ChunkedArray]:
        """Unit -> image_ids of its rows, in order."""
        ...


@dataclass(frozen=True)
class _Candidates:
    """A group of units, and the files that may hold them."""

    group: AdoptableUnits
    names: list[str]


def adopt_finished_units(
    uri: str, names: Iterable[str], digest: str, groups: Sequence[AdoptableUnits], mapper: Mapper
) -> dict[int, UnitFile]:
    """The finished units among the files ``names``, one file each; no more ids are held than one group has.

    Args:
        uri: The folder of predictions.
        names: Files of attempts, relative to it.
        digest: The plan's digest.
        groups: All units of the plan.
        mapper: Who does the work, a group a call.
    """
    names_by_unit: dict[int, list[str]] = {}
    for name in names:
        names_by_unit.setdefault(unit_number(name), []).append(name)
    # Only groups of which anything is there: their image_ids have to be read from the dataset.
    candidates: list[_Candidates] = []
    for group in groups:
        group_names = [name for unit in group.numbers for name in names_by_unit.get(unit, [])]
        if group_names:
            candidates.append(_Candidates(group, group_names))
    adopted: dict[int, UnitFile] = {}
    for unit_files in mapper(partial(_adopt_group, uri, digest), candidates):
        for unit_file in unit_files:
            # Several attempts may have finished a unit; any of their files will do, but only one.
            adopted.setdefault(unit_file.unit, unit_file)
    return adopted


def _adopt_group(uri: str, digest: str, candidates: _Candidates) -> list[UnitFile]:
    image_ids = candidates.group.image_ids()
    with ThreadPoolExecutor(min(THREADS, len(candidates.names))) as pool:
        unit_files = pool.map(lambda name: adoptable(uri, name, digest, image_ids[unit_number(name)]), candidates.names)
        return [unit_file for unit_file in unit_files if unit_file is not None]


def list_attempts(uri: str) -> list[str]:
    """Every file below the folder of predictions, relative to it; nothing where there is no folder."""
    return [listed.path for listed in storage.list_files(uri)] if storage.exists(uri) else []
