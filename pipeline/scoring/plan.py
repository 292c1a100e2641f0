"""What is scored, cut into units: a plan that is a pure function of its inputs. ``unit_reader`` reads one.

A unit is a slice of a dataset's row group, or a page of the sorted listing of a folder of images. Neither
the size of the cluster nor what an earlier attempt finished changes the plan, so attempts can share units.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.datasets.shard_reader import read_ids
from pipeline.errors import InputError
from pipeline.images import decode
from pipeline.models.bundle import Bundle
from pipeline.schema import LABEL_COLUMNS, SCHEMA_VERSION, SPLITS

UNIT_ROWS = 64
"""Images in a unit: what a crash may cost, and the step of the progress bar."""
UNIT_BYTES = 32 * 2**20
"""Encoded images of a page of a folder; row groups are bounded likewise when they are written."""
FEW_GROUPS = 64
"""A dataset of more row groups than this is not cut further: a slice reads its whole row group."""
GROUP_PAGES = 256
"""Pages of a listing that are adopted together."""

_COLUMNS = ["image_id", "uri", "sha256", "image", "height", "width"]


@dataclass(frozen=True)
class WorkUnit:
    """Some images and where they are: what a task gets. Its fields are part of the plan's digest."""

    number: int
    rows: int
    """Images in it."""
    source: dict[str, Any]
    """As JSON types. Of a dataset: ``file`` (relative to it), ``group`` and ``group_rows`` (the row group's number and
    rows), ``start`` (first row of it). Of a folder: ``root``, and ``paths`` and ``sizes`` of the files."""

    @property
    def files(self) -> list[str]:
        """The input files that the rows come from, for the footer of the output."""
        if "file" in self.source:
            return [f"{self.source['file']}#{self.source['group']}"]
        paths = self.source["paths"]
        return [f"{self.source['root']}: {paths[0]} to {paths[-1]}"]


@dataclass(frozen=True)
class UnitGroup:
    """Neighbouring units of one shard, or of some pages of a listing: what is adopted by one task."""

    units: tuple[WorkUnit, ...]
    data: str
    """URI of the dataset; empty for a folder of images."""

    @property
    def numbers(self) -> range:
        """The units' numbers."""
        return range(self.units[0].number, self.units[-1].number + 1)

    def image_ids(self) -> dict[int, pa.ChunkedArray]:
        """Unit -> image_ids of its rows, in order.

        Raises:
            InputError: The shard is gone, damaged, or another one than planned.
        """
        if "paths" in self.units[0].source:
            return {unit.number: pa.chunked_array([unit.source["paths"]], pa.string()) for unit in self.units}
        by_row_group = read_ids(storage.join(self.data, self.units[0].source["file"]))
        return {
            unit.number: by_row_group[unit.source["group"]].slice(unit.source["start"], unit.rows)
            for unit in self.units
        }


@dataclass(frozen=True)
class ScoringPlan:
    """All units of one job, and what its result depends on."""

    units: tuple[WorkUnit, ...]
    inputs: dict[str, Any]
    """What the result depends on: committed with it, and compared by a later job."""
    info: DatasetInfo | None
    """The dataset; None for a folder of images."""
    columns: tuple[str, ...]
    """Columns that are read from a dataset."""
    unit_rows: int = UNIT_ROWS
    """Most images of a unit, as the caller set it."""

    @cached_property
    def expected(self) -> dict[int, int]:
        """Unit -> its rows."""
        return {unit.number: unit.rows for unit in self.units}

    @cached_property
    def unit_groups(self) -> list[UnitGroup]:
        """All units, grouped by shard or by pages."""

        def key(unit: WorkUnit) -> Any:
            return unit.source.get("file", unit.number // GROUP_PAGES)

        data = self.info.uri if self.info is not None else ""
        return [UnitGroup(tuple(units), data) for _, units in groupby(self.units, key)]

    @property
    def rows(self) -> int:
        """Images in all."""
        return sum(self.expected.values())

    @cached_property
    def digest(self) -> str:
        """Names the plan: units are adopted from earlier attempts with the same digest only."""
        text = json.dumps([self.inputs, self.columns, [asdict(unit) for unit in self.units]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_scoring(
    bundle: Bundle,
    data: str,
    split: str | None,
    *,
    measure: bool,
    unit_rows: int = UNIT_ROWS,
    unit_bytes: int = UNIT_BYTES,
) -> ScoringPlan:
    """The units of ``data``, which is a dataset (``dataset.json`` is there) or a folder of images.

    Args:
        bundle: The bundle that will score them.
        data: URI of a dataset or of a folder.
        split: Split of the dataset; None for all that have rows.
        measure: Whether labels are read too.
        unit_rows: Most images of a unit.
        unit_bytes: Most encoded bytes of a unit of several images, in a folder.

    Raises:
        InputError: Nothing to score there, or no labels to measure against.
    """
    data = storage.absolute(data)
    if storage.exists(storage.join(data, "dataset.json")):
        return _plan_dataset(bundle, open_dataset(data), split, measure, unit_rows)
    if measure:
        raise InputError(f"no dataset at '{data}' (dataset.json is missing): metrics need labels; run dubito ingest")
    if split is not None:
        raise InputError(f"'{data}' is a folder of images without splits; leave out the split '{split}'")
    return _plan_folder(bundle, data, unit_rows, unit_bytes)


def _inputs(bundle: Bundle, kind: str, digest: str, splits: Sequence[str]) -> dict[str, Any]:
    return {
        "bundle_id": bundle.id,
        "data": digest,
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "splits": list(splits),
    }


def _plan_dataset(bundle: Bundle, info: DatasetInfo, split: str | None, measure: bool, unit_rows: int) -> ScoringPlan:
    if measure:
        require_labels(bundle, info)
    splits = [split] if split is not None else [name for name in SPLITS if info.counts.get(name, {}).get("images")]
    if not splits:
        raise InputError(f"dataset '{info.uri}' has no rows; ingest some images")
    groups = [group for name in splits for group in row_groups(info, name)]
    # With many row groups a unit is a whole one: each slice would read all of it anew.
    step = unit_rows if len(groups) <= FEW_GROUPS else max(group.rows for group in groups)
    units: list[WorkUnit] = []
    for group in groups:
        for start in range(0, group.rows, step):
            rows = min(step, group.rows - start)
            # Relative to the dataset, so that a moved or mirrored one is the same input.
            file = group.file.removeprefix(info.uri).lstrip("/")
            source = {"file": file, "group": group.index, "group_rows": group.rows, "start": start}
            units.append(WorkUnit(len(units), rows, source))
    columns = [*_COLUMNS, *(LABEL_COLUMNS[bundle.task] if measure else [])]
    return ScoringPlan(
        tuple(units), _inputs(bundle, "dataset", info.fingerprint, splits), info, tuple(columns), unit_rows
    )


def require_labels(bundle: Bundle, info: DatasetInfo) -> None:
    """The dataset has labels for the bundle's task, and the same classes.

    Raises:
        InputError: It has not; the first difference is named.
    """
    if bundle.task not in info.tasks:
        raise InputError(
            f"bundle of another task: '{bundle.uri}' is for {bundle.task}, but dataset '{info.uri}' "
            f"has labels for {' and '.join(info.tasks) or 'no task'}; choose another bundle or dataset"
        )
    for label in range(max(len(bundle.classes), len(info.classes))):
        in_bundle, in_dataset = (
            f"'{names[label]}'" if label < len(names) else "absent" for names in (bundle.classes, info.classes)
        )
        if in_bundle != in_dataset:
            raise InputError(
                f"classes differ: label {label} is {in_bundle} in bundle '{bundle.uri}' and {in_dataset} in "
                f"dataset '{info.uri}'; ingest with --classes {','.join(bundle.classes)}"
            )


def _plan_folder(bundle: Bundle, root: str, unit_rows: int, unit_bytes: int) -> ScoringPlan:
    files = storage.list_files(root, decode.IMAGE_SUFFIXES)
    if not files:
        endings = ", ".join(decode.IMAGE_SUFFIXES)
        raise InputError(f"no images in '{root}': wanted files ending in {endings}, or a dataset; check the path")
    units: list[WorkUnit] = []
    page: list[storage.Listed] = []
    for position, file in enumerate(files):
        page.append(file)
        is_last = position + 1 == len(files)
        next_bytes = 0 if is_last else files[position + 1].size
        # A page ends before the file that would make it too large; a file that is too large alone is a page.
        is_full = len(page) == unit_rows or sum(listed.size for listed in page) + next_bytes > unit_bytes
        if is_full or is_last:
            source = {
                "root": root,
                "paths": [listed.path for listed in page],
                "sizes": [listed.size for listed in page],
            }
            units.append(WorkUnit(len(units), len(page), source))
            page = []
    # Names and sizes stand for the contents, which nobody reads twice.
    digest = hashlib.sha256("\n".join([root, *(f"{file.size} {file.path}" for file in files)]).encode())
    return ScoringPlan(tuple(units), _inputs(bundle, "folder", digest.hexdigest(), []), None, (), unit_rows)
