"""Predictor: rows of encoded images in, prediction rows out, for one member or many; knows no Ray.

Each image is read and decoded once whatever the number of members: they run one after the other over the
same batch on the device, and the task keeps running sums over them.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pipeline import decode
from pipeline.augment import Augment, Batch, InputSettings
from pipeline.bundle import Bundle, open_bundle
from pipeline.errors import InputError
from pipeline.schema import PREDICTIONS
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task

PIXELS_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}
"""Pixels of all images in one batch, by kind of device: 8 images of 512 x 512 on a CPU, 64 on a GPU."""
IMAGES_AT_ONCE = 256
_CARRIED = ("image_id", "uri", "sha256")


@dataclass
class Meters:
    """Metrics of the pool, and of each member."""

    pool: Any
    members: list[Any]

    def merge(self, other: "Meters") -> None:
        """Add what ``other`` has counted."""
        self.pool.merge(other.pool)
        for mine, its in zip(self.members, other.members, strict=True):
            mine.merge(its)

    def compute(self) -> dict[str, Any]:
        """Of the pool, and ``members``: a list of the same for each."""
        return {**self.pool.compute(), "members": [metric.compute() for metric in self.members]}

    def to_bytes(self) -> bytes:
        """All counts in one numpy archive: ``pool/<name>``, ``0/<name>``, ``1/<name>``..."""
        arrays: dict[str, np.ndarray] = {}
        owners = [("pool", self.pool), *((str(k), metric) for k, metric in enumerate(self.members))]
        for owner, metric in owners:
            arrays |= {f"{owner}/{name}": value for name, value in metric.state().items()}
        out = io.BytesIO()
        np.savez_compressed(out, allow_pickle=False, **arrays)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, metric: Any) -> Self:
        """Undo ``to_bytes``; ``metric`` is any metric of the same task."""
        states: dict[str, dict[str, np.ndarray]] = {}
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for name in archive.files:
                owner, key = name.split("/", 1)
                states.setdefault(owner, {})[key] = archive[name]
        made = {owner: metric.from_state(state) for owner, state in states.items()}
        return cls(made["pool"], [made[str(k)] for k in range(len(made) - 1)])


def pick_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def task_of(bundle: Bundle, threads: int = 1, multiple: int = 32) -> Task:
    """The task that a bundle's members were trained for, over its classes and input."""
    return TASKS[bundle.task](
        classes=bundle.classes,
        background=bundle.background,
        input=InputSettings.parse(bundle.manifest["input"], f"bundle '{bundle.uri}': input"),
        loss={},
        predict=bundle.manifest["predict"],
        threads=threads,
        multiple=multiple,
    )


class Predictor:
    """All members of a bundle, loaded once; then a table of images -> a table of predictions.

    Args:
        bundle: A bundle, or its URI.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        threads: Threads that decode images; None = one for each core.

    Raises:
        InputError: The bundle is missing, damaged, or of another version.
    """

    def __init__(self, bundle: str | Bundle, device: str = "auto", threads: int | None = None) -> None:
        self.bundle = open_bundle(bundle) if isinstance(bundle, str) else bundle
        self.device = pick_device(device)
        self.members = [self._load(k) for k in range(self.bundle.members)]
        # Frames in coarser steps than the model asks for, so that images of nearly one size share a batch.
        multiple = math.lcm(32, int(getattr(self.members[0], "stride", 1)))
        self.task = task_of(self.bundle, threads or len(os.sched_getaffinity(0)), multiple)
        self.input = self.task.input
        self.schema = PREDICTIONS[self.bundle.task]
        self._normalise = Augment(None, self.input, 0)
        self._worked = False

    def _load(self, k: int) -> nn.Module:
        module = self.bundle.load_member(k)
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return module.to(self.device)

    def meters(self) -> Meters:
        """Fresh metrics."""
        return Meters(self.task.metric(), [self.task.metric() for _ in self.members])

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of ``schema.PREDICTIONS[task]`` for each row of ``table``, in its order.

        Args:
            table: ``image_id, uri, sha256, image`` (encoded bytes, may be null); where they are there,
                ``height, width``, and ``status, error`` of images that could not be fetched. An image that
                cannot be used gives a row with its status and nothing predicted.
        """
        return self._run(table, None)

    def measure(self, table: pa.Table) -> tuple[pa.Table, Meters]:
        """As a call, and the metrics against the label columns of ``table``."""
        meters = self.meters()
        return self._run(table, meters), meters

    def _run(self, table: pa.Table, meters: Meters | None) -> pa.Table:
        rows = _Rows(table, self)
        failed: list[Exception] = []
        for chunk, collated in self._collated(table, self._chunks(table, rows.usable())):
            failed += self._chunk(table, chunk, collated, rows, meters)
        self._worked = self._worked or rows.ok > 0
        if failed and not self._worked:
            # Not an odd image but a fault of the model or of this program: rows would hide it.
            raise failed[0]
        return rows.table()

    def _chunks(self, table: pa.Table, usable: Sequence[int]) -> list[list[int]]:
        """Rows that go through the model together: of one shape, at most a budget of pixels."""
        budget = PIXELS_AT_ONCE.get(self.device.type, PIXELS_AT_ONCE["cpu"])
        groups: dict[tuple[int, int], list[int]] = {}
        for row in usable:
            groups.setdefault(self._shape(table, row), []).append(row)
        chunks: list[list[int]] = []
        for (height, width), members in groups.items():
            size = min(IMAGES_AT_ONCE, max(1, budget // max(1, height * width)))
            chunks += [members[at : at + size] for at in range(0, len(members), size)]
        return chunks

    def _shape(self, table: pa.Table, row: int) -> tuple[int, int]:
        """(H, W) of the frame that the row's image will have; (0, 0) where it is no image."""
        if self.input.fit != "crop":
            return self.input.size
        height, width = (
            table[name][row].as_py() if name in table.column_names else None for name in ("height", "width")
        )
        if not height or not width:
            try:
                info = decode.probe(table["image"][row].as_py())
            except decode.DecodeError:
                return 0, 0
            height, width = info.height, info.width
        multiple = self.task.multiple
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def _collated(self, table: pa.Table, chunks: list[list[int]]) -> Iterator[tuple[list[int], Any]]:
        """Each chunk with its decoded batch; on a GPU the next one is decoded while this one is used."""
        if self.device.type == "cpu":
            for chunk in chunks:
                yield chunk, self.task.collate(table.take(chunk), train=False, seed=0)
            return
        with ThreadPoolExecutor(1, "collate") as pool:
            ahead = [pool.submit(self.task.collate, table.take(chunk), train=False, seed=0) for chunk in chunks[:1]]
            for at, chunk in enumerate(chunks):
                collated = ahead.pop().result()
                for following in chunks[at + 1 : at + 2]:
                    ahead.append(pool.submit(self.task.collate, table.take(following), train=False, seed=0))
                yield chunk, collated

    def _chunk(
        self, table: pa.Table, chunk: list[int], collated: Any, rows: "_Rows", meters: Meters | None
    ) -> list[Exception]:
        """Fill the rows of one chunk; returns what the model raised for images that failed alone."""
        batch, failures = collated
        for at, reason, detail in failures:
            rows.fail(chunk[at], reason, detail)
        bad = {at for at, _, _ in failures}
        kept = [row for at, row in enumerate(chunk) if at not in bad]
        if not kept:
            return []
        counted = None if meters is None else self.meters()
        fault: Exception | None = None
        try:
            columns, sizes = self._infer(batch, table.take(kept) if counted else None, counted)
            rows.fill(kept, columns, sizes)
        except InputError:
            raise
        except Exception as error:  # out of memory, or an image that some library chokes on: find it
            fault = error.with_traceback(None)  # which would keep the tensors alive
        if fault is None:
            if meters is not None and counted is not None:
                meters.merge(counted)
            return []
        if len(kept) == 1:
            rows.fail(kept[0], "error", f"{type(fault).__name__}: {fault}")
            return [fault]
        del batch, collated
        halves = (kept[: len(kept) // 2], kept[len(kept) // 2 :])
        again = ((half, self.task.collate(table.take(half), train=False, seed=0)) for half in halves)
        return [item for half, part in again for item in self._chunk(table, half, part, rows, meters)]

    @torch.inference_mode()
    def _infer(
        self, batch: Batch, truth: pa.Table | None, meters: Meters | None
    ) -> tuple[dict[str, list[Any]], list[list[int]]]:
        """(columns of ``to_columns``, [[height, width], ...]) of one batch."""
        view = self._normalise(batch.to(self.device))
        images = view.images.contiguous(memory_format=torch.channels_last)

        def predictions() -> Iterator[Any]:
            for k, module in enumerate(self.members):
                prediction = self.task.predict(module(images), view)
                if meters is not None:
                    self.task.measure(prediction, view, truth, meters.members[k])
                yield prediction

        fused = self.task.fuse(predictions())
        if meters is not None:
            self.task.measure(fused, view, truth, meters.pool)
        return self.task.to_columns(fused, view), view.sizes.tolist()


class _Rows:
    """The output rows while they are being filled, in the order of the input."""

    def __init__(self, table: pa.Table, predictor: Predictor) -> None:
        count, bundle = table.num_rows, predictor.bundle
        self.schema, self.threshold, self.ok = predictor.schema, bundle.manifest["threshold"], 0
        self.columns: dict[str, list[Any]] = {name: [None] * count for name in self.schema.names}
        for name in (*_CARRIED, "height", "width", "status", "error"):
            if name in table.column_names:
                self.columns[name] = table[name].to_pylist()
        self.columns["bundle_id"] = [bundle.id] * count
        self.columns["members"] = [bundle.members] * count
        self.missing = [not value.is_valid for value in table["image"]]
        for row in self.usable():
            self.columns["status"][row] = None
        for row, absent in enumerate(self.missing):
            if absent and self.columns["status"][row] in (None, "ok"):
                self.fail(row, "missing", "no image bytes")

    def usable(self) -> list[int]:
        """Rows that have bytes and have not failed."""
        status = self.columns["status"]
        return [row for row, absent in enumerate(self.missing) if not absent and status[row] in (None, "ok")]

    def fail(self, row: int, status: str, detail: str) -> None:
        """Nothing is predicted for this row."""
        self.columns["status"][row] = status
        self.columns["error"][row] = " ".join(detail.split())[:300]

    def fill(self, rows: Sequence[int], columns: dict[str, list[Any]], sizes: list[list[int]]) -> None:
        """The predictions of ``rows``."""
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                self.columns[name][row] = value
        for row, (height, width) in zip(rows, sizes, strict=True):
            self.columns["height"][row], self.columns["width"][row] = height, width
            self.columns["status"][row], self.columns["error"][row] = "ok", None
            if self.threshold is not None:
                doubtful = not self.columns["uncertainty"][row] <= self.threshold
                self.columns["decision"][row] = "review" if doubtful else "accept"
        self.ok += len(rows)

    def table(self) -> pa.Table:
        """The finished rows; every one has a status."""
        assert None not in self.columns["status"]
        return pa.Table.from_pydict(self.columns, schema=self.schema)
