"""What of earlier attempts is as good as new: finished unit files, compared with the plan one piece at a time."""

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


class UnitGroup(Protocol):
    """Neighbouring units of a plan whose rows come from one place; small enough to hold all its image_ids."""

    @property
    def units(self) -> range:
        """Their numbers."""
        ...

    def ids(self) -> Mapping[int, pa.ChunkedArray]:
        """Unit -> image_ids of its rows, in order."""
        ...


@dataclass(frozen=True)
class _Found:
    """A piece, and the files that may be of its units."""

    piece: UnitGroup
    names: list[str]


def adopt_finished_units(
    uri: str, names: Iterable[str], digest: str, pieces: Sequence[UnitGroup], mapper: Mapper
) -> dict[int, UnitFile]:
    """The finished units among the files ``names``, one file each; no more ids are held than one piece has.

    Args:
        uri: The folder of predictions.
        names: Files of attempts, relative to it.
        digest: The plan's digest.
        pieces: Of the plan.
        mapper: Who does the work, a piece a call.
    """
    by_unit: dict[int, list[str]] = {}
    for name in names:
        by_unit.setdefault(unit_number(name), []).append(name)
    found = []
    for piece in pieces:
        mine = [name for unit in piece.units for name in by_unit.get(unit, [])]
        if mine:
            found.append(_Found(piece, mine))
    adopted: dict[int, UnitFile] = {}
    for part in mapper(partial(_adopt_piece, uri, digest), found):
        for item in part:
            adopted.setdefault(item.unit, item)
    return adopted


def _adopt_piece(uri: str, digest: str, found: _Found) -> list[UnitFile]:
    ids = found.piece.ids()
    with ThreadPoolExecutor(min(THREADS, len(found.names))) as pool:
        made = pool.map(lambda name: adoptable(uri, name, digest, ids[unit_number(name)]), found.names)
        return [item for item in made if item is not None]


def list_attempts(uri: str) -> list[str]:
    """Every file below the folder of predictions, relative to it."""
    return [item.path for item in storage.list_files(uri)] if storage.exists(uri) else []
