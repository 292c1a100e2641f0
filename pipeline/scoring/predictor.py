"""Predictor: rows of encoded images in, prediction rows out, for one member or many; knows no Ray.

Each image is read and decoded once whatever the number of members: they run one after the other over the
same batch on the device, and the task keeps running sums over them. Calls from several threads overlap: while
one batch is in the members, the next is decoded and the one before is encoded.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.augment import Augment
from pipeline.errors import InputError
from pipeline.images import decode
from pipeline.images.batch import Batch
from pipeline.images.gpu_decode import DeviceDecoder
from pipeline.models.bundle import Bundle, open_bundle
from pipeline.models.device import (
    Compile,
    Compiled,
    Precision,
    autocast,
    pick_device,
    to_device_channels_last,
    wants_compile,
)
from pipeline.scoring.batch_norm_folding import fold_batch_norms
from pipeline.scoring.batch_size import BatchSize, MeasurePeakMemory, out_of_memory
from pipeline.scoring.cuda_streams import ModelStreams
from pipeline.scoring.ensemble_metrics import POOL, SAMPLE, UNCALIBRATED, EnsembleMetrics, member_sample
from pipeline.scoring.prediction_rows import PredictionRows
from pipeline.scoring.sliding_window import needs_sliding_window, sliding_window_logits
from pipeline.tasks.base import Failure
from pipeline.tasks.build import task_for_bundle
from pipeline.uncertainty.tta import View, inference_passes

Purpose = Literal["metrics", "sample"]
"""What is counted against labels: metrics of pool and members, or what a calibration is fitted on."""


class Predictor:
    """All members of a bundle, loaded once; then a table of images -> a table of predictions.

    Args:
        bundle: A bundle, or its URI.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        threads: Threads that decode images; None = one for each core.
        batch: Images that go through the members at once; None = as many as memory allows.
        precision: Of the members' arithmetic; probabilities and measures are float32 always.
        compile: Whether members are compiled; images seen at their own size never are.
        steps: About how many batches will come, of all members together, by which ``auto`` decides to compile.
        calls: Threads that will call it at a time.

    Raises:
        InputError: The bundle is missing, damaged, or of another version.
    """

    def __init__(
        self,
        bundle: str | Bundle,
        device: str = "auto",
        threads: int | None = None,
        *,
        batch: int | None = None,
        precision: Precision = "auto",
        compile: Compile = "auto",
        steps: int = 0,
        calls: int = 1,
    ) -> None:
        self.bundle = open_bundle(bundle) if isinstance(bundle, str) else bundle
        self.device = pick_device(device)
        self.precision: Precision = precision
        self.members = [self._load(k) for k in range(self.bundle.members)]
        self.stride = math.lcm(*(int(getattr(module, "stride", 1)) for module in self.members))
        # Frames in coarser steps than the model asks for, so that images of nearly one size share a batch.
        threads = threads or len(os.sched_getaffinity(0))
        self.task = task_for_bundle(self.bundle, threads, math.lcm(32, self.stride))
        self.input, self.inference = self.task.input, self.task.inference
        self.passes = list(inference_passes(self.inference))
        if self.inference.dropout_passes:
            self._switch_dropout_on()
        self.size = BatchSize(self.device, batch, calls)
        self.lanes = ModelStreams(self.device, turns=self.inference.dropout_passes > 0)
        self._decoder = DeviceDecoder(self.device, threads) if self.device.type == "cuda" else None
        self._normalise = Augment(None, self.input, 0)
        # Of frames of many sizes each would be compiled anew; compiled dropout draws other numbers.
        fit = self.input.fit != "crop" and not self.inference.dropout_passes
        wanted = fit and wants_compile(self.device, compile, steps)
        self._compiled = [Compiled(module) for module in self.members] if wanted else None
        self._worked = False

    def _load(self, member: int) -> nn.Module:
        module = to_device_channels_last(self.bundle.load_member(member), self.device)
        if self.device.type != "cpu":  # compiled there, where that pays, with the norms in the same kernels
            return module
        return fold_batch_norms(module, 2 * math.lcm(32, int(getattr(module, "stride", 1))))

    def _switch_dropout_on(self) -> None:
        for module in self.members:
            models.require_dropout(module, self.inference.dropout_passes, f"bundle '{self.bundle.uri}'")
            models.enable_dropout(module, True)

    def new_metrics(self, purpose: Purpose) -> EnsembleMetrics:
        """Fresh counters."""
        if purpose == "sample":
            each = self.task.calibrates_members and not self.bundle.same_model
            own = [member_sample(k) for k in range(len(self.members))] if each else []
            return EnsembleMetrics({name: self.task.new_calibration_sample() for name in (SAMPLE, *own)})
        names = [POOL, *(str(k) for k in range(len(self.members)))]
        names += [UNCALIBRATED] if self.task.calibration else []
        return EnsembleMetrics({name: self.task.metric(name == POOL) for name in names})

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of ``schema.PREDICTIONS[task]`` for each row of ``table``, in its order.

        Args:
            table: ``image_id, uri, sha256, image`` (encoded bytes, may be null); where they are there,
                ``height, width``, and ``status, error`` of images that could not be fetched. An image that
                cannot be used gives a row with its status and nothing predicted.
        """
        return self._run(table, None)

    def measure(self, table: pa.Table, purpose: Purpose = "metrics") -> tuple[pa.Table, EnsembleMetrics]:
        """As a call, and what was counted against the label columns of ``table``."""
        meters = self.new_metrics(purpose)
        return self._run(table, meters), meters

    def _run(self, table: pa.Table, meters: EnsembleMetrics | None) -> pa.Table:
        rows = PredictionRows(table, self.bundle, self.bundle.members * len(self.passes))
        failed: list[Exception] = []
        for chunk in self._chunks(table, rows.usable_rows()):
            with self.lanes.thread_stream():
                failed += self._predict_chunk(table, chunk, rows, meters)
        self._worked = self._worked or rows.ok > 0
        if failed and not self._worked:
            # Not an odd image but a fault of the model or of this program: rows would hide it.
            raise failed[0]
        return rows.to_table()

    def _chunks(self, table: pa.Table, usable: Sequence[int]) -> Iterator[list[int]]:
        """Rows that go through the model together: of one shape, as many as the size is by then."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row in usable:
            groups.setdefault(self._shape(table, row), []).append(row)
        for (height, width), members in groups.items():
            at = 0
            while at < len(members):
                following = at + self.size.images(height, width)
                yield members[at:following]
                at = following

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

    def _collate(self, table: pa.Table) -> tuple[Batch, list[Failure]]:
        """Decoded and framed, on a GPU where that can be; copied there ahead of the model's turn."""
        if self._decoder is None:
            return self.task.collate(table, train=False, seed=0)
        try:
            decoded = self._decoder(table["image"].to_pylist())
            batch, failures = self.task.collate(table, train=False, seed=0, decoded=decoded)
        except RuntimeError:  # out of the device's memory, most likely: the host has more
            batch, failures = self.task.collate(table, train=False, seed=0)
        return batch.pin_memory().to(self.device, non_blocking=True), failures

    def _predict_chunk(
        self, table: pa.Table, chunk: list[int], rows: PredictionRows, meters: EnsembleMetrics | None
    ) -> list[Exception]:
        """Fill the rows of one chunk; returns what the model raised for images that failed alone."""
        try:
            batch, failures = self._collate(table.take(chunk))
        except MemoryError:
            if len(chunk) == 1:
                rows.fail(chunk[0], "error", "MemoryError: the decoded image does not fit into this process's memory")
                return []
            halves = (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :])
            return [item for half in halves for item in self._predict_chunk(table, half, rows, meters)]
        for at, reason, detail in failures:
            rows.fail(chunk[at], reason, detail)
        bad = {at for at, _, _ in failures}
        kept = [row for at, row in enumerate(chunk) if at not in bad]
        if not kept:
            return []
        counted = None if meters is None else self.new_metrics("sample" if SAMPLE in meters.counters else "metrics")
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
        height, width = batch.images.shape[-2:]
        if len(kept) == 1:
            # Frames of one size all take as much: no fault of the image, and a row would hide it.
            if out_of_memory(fault) and self.input.fit != "crop":
                raise InputError(
                    f"image '{batch.image_ids[0]}': one image of {height}x{width} does not fit into the memory of this "
                    "process together with what else is in hand; run fewer actors, or lower predict.window_overlap, "
                    "predict.tta or the members' input.size, or give it more memory"
                )
            rows.fail(kept[0], "error", f"{type(fault).__name__}: {fault}")
            return [fault]
        if out_of_memory(fault):
            self.size.halve(len(kept) * height * width)
        del batch
        halves = (kept[: len(kept) // 2], kept[len(kept) // 2 :])
        return [item for half in halves for item in self._predict_chunk(table, half, rows, meters)]

    @torch.inference_mode()
    def _infer(
        self, batch: Batch, truth: pa.Table | None, meters: EnsembleMetrics | None
    ) -> tuple[dict[str, list[Any]], list[list[int]]]:
        """(columns of ``to_columns``, [[height, width], ...]) of one batch."""
        counters = {} if meters is None else meters.counters

        def predictions(view: Batch) -> Iterator[Any]:
            images = view.images.contiguous(memory_format=torch.channels_last)
            for k in range(len(self.members)):
                counted = {str(k), member_sample(k)} & counters.keys()
                own = self.task.new_view_mean() if counted else None
                for outputs, look, seen in self._forward_views(k, self._renormalised(k, images), batch.image_ids):
                    prediction = self.task.predict(outputs, view, look, seen)
                    del outputs
                    if own is not None:
                        own.add(prediction)
                    yield prediction
                if own is None:
                    continue
                # A member's own figures are those of the mean over its views and passes.
                if str(k) in counters:
                    self.task.update_metric(own.result(), view, truth, counters[str(k)])
                else:
                    self.task.update_sample(own.result(), view, truth, counters[member_sample(k)])

        with self.lanes.model_stream(), MeasurePeakMemory(self.size, batch.images[:, 0].numel()):
            view = self._normalise(batch.to(self.device))
            fused = self.task.fuse(predictions(view))
        if POOL in counters:
            self.task.update_metric(fused, view, truth, counters[POOL])
        if UNCALIBRATED in counters:
            self.task.update_metric(self.task.without_calibration(fused), view, truth, counters[UNCALIBRATED])
        if SAMPLE in counters:
            self.task.update_sample(fused, view, truth, counters[SAMPLE])
        return self.task.to_columns(fused, view), view.sizes.tolist()

    def _renormalised(self, k: int, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) as member ``k`` wants them, where members differ in that."""
        each = self.bundle.manifest["normalise"]
        if each is None:
            return images
        values = [self.input.mean, self.input.std, each[k]["mean"], each[k]["std"]]
        mean, std, own_mean, own_std = torch.tensor(values).to(images)[..., None, None]
        return (images * std + (mean - own_mean)) / own_std

    def _forward_views(
        self, k: int, images: Tensor, image_ids: list[str]
    ) -> Iterator[tuple[Any, View, tuple[int, int]]]:
        """(raw outputs, view, its height and width) of one member: once, or for each view and dropout pass."""
        for number, look in self.passes:
            with self._seeded(f"{k} {number} {image_ids[0]}"):
                shown = look.apply(images, self.stride)
                yield self._ask(k, shown), look, (shown.shape[-2], shown.shape[-1])

    def _ask(self, k: int, images: Tensor) -> Any:
        """Member ``k``'s outputs for (N, 3, H, W), seen whole or through windows."""
        canvas, window, module = (images.shape[-2], images.shape[-1]), self.input.size, self.members[k]
        with autocast(self.device, self.precision):
            if self.input.fit == "crop" and needs_sliding_window(self.inference, canvas, window):
                return sliding_window_logits(module, images, window, self.inference.window_overlap)
            # The odd batch at the end of a unit is not worth compiling for.
            if self._compiled is not None and len(images) == self.size.images(*canvas):
                return self._compiled[k](images)
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
