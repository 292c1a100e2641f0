"""Predictor: rows of encoded images in, prediction rows out, for one member or many; knows no Ray.

Each image is read and decoded once whatever the number of members: they run one after the other over the
same batch on the device, and the task keeps running sums over them.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline import decode, models
from pipeline.augment import Augment, Batch, InputSettings
from pipeline.bundle import Bundle, open_bundle
from pipeline.errors import InputError
from pipeline.meters import POOL, SAMPLE, UNCALIBRATED, Meters, member_sample
from pipeline.rows import Rows
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task
from pipeline.views import View, each_pass, through_windows, uses_windows

PIXELS_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}
"""Pixels of all images in one batch, by kind of device: 8 images of 512 x 512 on a CPU, 64 on a GPU."""
IMAGES_AT_ONCE = 256
Purpose = Literal["metrics", "sample"]
"""What is counted against labels: metrics of pool and members, or what a calibration is fitted on."""


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
        calibration=bundle.manifest["calibration"],
        score_threshold=bundle.manifest["score_threshold"],
        alike=bundle.alike,
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
        self.stride = math.lcm(*(int(getattr(module, "stride", 1)) for module in self.members))
        # Frames in coarser steps than the model asks for, so that images of nearly one size share a batch.
        self.task = task_of(self.bundle, threads or len(os.sched_getaffinity(0)), math.lcm(32, self.stride))
        self.input, self.inference = self.task.input, self.task.inference
        self.passes = list(each_pass(self.inference))
        if self.inference.dropout_passes:
            self._switch_dropout_on()
        self._normalise = Augment(None, self.input, 0)
        self._worked = False

    def _load(self, k: int) -> nn.Module:
        module = self.bundle.load_member(k)
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return module.to(self.device)

    def _switch_dropout_on(self) -> None:
        for module in self.members:
            models.require_dropout(module, self.inference.dropout_passes, f"bundle '{self.bundle.uri}'")
            models.set_sampling(module, True)

    def meters(self, purpose: Purpose) -> Meters:
        """Fresh counters."""
        if purpose == "sample":
            each = self.task.calibrates_members and not self.bundle.alike
            own = [member_sample(k) for k in range(len(self.members))] if each else []
            return Meters({name: self.task.new_sample() for name in (SAMPLE, *own)})
        names = [POOL, *(str(k) for k in range(len(self.members)))]
        names += [UNCALIBRATED] if self.task.calibration else []
        return Meters({name: self.task.metric(name == POOL) for name in names})

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of ``schema.PREDICTIONS[task]`` for each row of ``table``, in its order.

        Args:
            table: ``image_id, uri, sha256, image`` (encoded bytes, may be null); where they are there,
                ``height, width``, and ``status, error`` of images that could not be fetched. An image that
                cannot be used gives a row with its status and nothing predicted.
        """
        return self._run(table, None)

    def measure(self, table: pa.Table, purpose: Purpose = "metrics") -> tuple[pa.Table, Meters]:
        """As a call, and what was counted against the label columns of ``table``."""
        meters = self.meters(purpose)
        return self._run(table, meters), meters

    def _run(self, table: pa.Table, meters: Meters | None) -> pa.Table:
        rows = Rows(table, self.bundle, self.bundle.members * len(self.passes))
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
        self, table: pa.Table, chunk: list[int], collated: Any, rows: Rows, meters: Meters | None
    ) -> list[Exception]:
        """Fill the rows of one chunk; returns what the model raised for images that failed alone."""
        batch, failures = collated
        for at, reason, detail in failures:
            rows.fail(chunk[at], reason, detail)
        bad = {at for at, _, _ in failures}
        kept = [row for at, row in enumerate(chunk) if at not in bad]
        if not kept:
            return []
        counted = None if meters is None else self.meters("sample" if SAMPLE in meters.counters else "metrics")
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
        counters = {} if meters is None else meters.counters

        def predictions() -> Iterator[Any]:
            for k, module in enumerate(self.members):
                counted = {str(k), member_sample(k)} & counters.keys()
                own = self.task.average() if counted else None
                for outputs, look, seen in self._answers(k, module, self._coloured(k, images), batch.image_ids):
                    prediction = self.task.predict(outputs, view, look, seen)
                    del outputs
                    if own is not None:
                        own.add(prediction)
                    yield prediction
                if own is None:
                    continue
                # A member's own figures are those of the mean over its views and passes.
                if str(k) in counters:
                    self.task.measure(own.result(), view, truth, counters[str(k)])
                else:
                    self.task.sample(own.result(), view, truth, counters[member_sample(k)])

        fused = self.task.fuse(predictions())
        if POOL in counters:
            self.task.measure(fused, view, truth, counters[POOL])
        if UNCALIBRATED in counters:
            self.task.measure(self.task.uncalibrated(fused), view, truth, counters[UNCALIBRATED])
        if SAMPLE in counters:
            self.task.sample(fused, view, truth, counters[SAMPLE])
        return self.task.to_columns(fused, view), view.sizes.tolist()

    def _coloured(self, k: int, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) as member ``k`` wants them, where members differ in that."""
        each = self.bundle.manifest["normalise"]
        if each is None:
            return images
        values = [self.input.mean, self.input.std, each[k]["mean"], each[k]["std"]]
        mean, std, own_mean, own_std = torch.tensor(values).to(images)[..., None, None]
        return (images * std + (mean - own_mean)) / own_std

    def _answers(
        self, k: int, module: nn.Module, images: Tensor, image_ids: list[str]
    ) -> Iterator[tuple[Any, View, tuple[int, int]]]:
        """(raw outputs, view, its height and width) of one member: once, or for each view and dropout pass."""
        for number, look in self.passes:
            with self._seeded(f"{k} {number} {image_ids[0]}"):
                shown = look.look(images, self.stride)
                yield self._ask(module, shown), look, (shown.shape[-2], shown.shape[-1])

    def _ask(self, module: nn.Module, images: Tensor) -> Any:
        """Outputs for (N, 3, H, W), seen whole or through windows."""
        canvas, window = (images.shape[-2], images.shape[-1]), self.input.size
        if self.input.fit == "crop" and uses_windows(self.inference, canvas, window):
            return through_windows(module, images, window, self.inference.window_overlap)
        return module(images)

    @contextlib.contextmanager
    def _seeded(self, key: str) -> Iterator[None]:
        """What dropout drops depends on the images asked about, not on what was asked before."""
        if not self.inference.dropout_passes:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1)
            yield
