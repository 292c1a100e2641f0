"""All members of a bundle on one device: normalised images in, each member's raw outputs out, a view at a time."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.images.input_settings import InputSettings
from pipeline.models.bundle import Bundle
from pipeline.models.device import Compile, Compiled, Precision, autocast, to_device_channels_last, wants_compile
from pipeline.scoring.batch_norm_folding import fold_batch_norms
from pipeline.scoring.sliding_window import needs_sliding_window, sliding_window_logits
from pipeline.uncertainty.tta import InferenceSettings, View, inference_passes


def load_members(bundle: Bundle, device: torch.device) -> list[nn.Module]:
    """The members' networks on the device, in eval mode."""
    return [_load_member(bundle, k, device) for k in range(bundle.members)]


def _load_member(bundle: Bundle, k: int, device: torch.device) -> nn.Module:
    module = to_device_channels_last(bundle.load_member(k), device)
    if device.type != "cpu":  # compiled there, where that pays, with the norms in the same kernels
        return module
    return fold_batch_norms(module, 2 * math.lcm(32, stride_of([module])))


def stride_of(modules: Sequence[nn.Module]) -> int:
    """Pixels that sides of images must be a multiple of, for every one of the networks."""
    return math.lcm(*(int(getattr(module, "stride", 1)) for module in modules))


class MemberForward:
    """The networks of a bundle, and how they are run.

    Args:
        bundle: Whose members.
        modules: The members' networks, on the device.
        device: Where they are.
        input: Size and normalisation that images come in.
        inference: Views, dropout passes and windows.
        precision: Of the networks' arithmetic.
        compile: Whether they are compiled; never where images come at their own sizes, or with dropout.
        steps: About how many batches will come, of all members together, by which ``auto`` decides to compile.

    Raises:
        InputError: Dropout passes are wanted of a model without dropout.
    """

    def __init__(
        self,
        bundle: Bundle,
        modules: list[nn.Module],
        device: torch.device,
        *,
        input: InputSettings,
        inference: InferenceSettings,
        precision: Precision,
        compile: Compile,
        steps: int,
    ) -> None:
        self.bundle, self.modules, self.device = bundle, modules, device
        self.input, self.inference = input, inference
        self.precision: Precision = precision
        self.stride = stride_of(modules)
        self.passes = list(inference_passes(inference))
        if inference.dropout_passes:
            for module in modules:
                models.require_dropout(module, inference.dropout_passes, f"bundle '{bundle.uri}'")
                models.enable_dropout(module, True)
        # Of frames of many sizes each would be compiled anew; compiled dropout draws other numbers.
        compilable = input.fit != "crop" and not inference.dropout_passes
        compiles = compilable and wants_compile(device, compile, steps)
        self._compiled = [Compiled(module) for module in modules] if compiles else None

    def renormalise(self, k: int, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) as member ``k`` wants them, where members differ in that."""
        normalisations = self.bundle.manifest["normalise"]
        if normalisations is None:
            return images
        values = [self.input.mean, self.input.std, normalisations[k]["mean"], normalisations[k]["std"]]
        mean, std, member_mean, member_std = torch.tensor(values).to(images)[..., None, None]
        return (images * std + (mean - member_mean)) / member_std

    def outputs_by_view(
        self, k: int, images: Tensor, image_ids: list[str], full_batch: Callable[[int, int], int]
    ) -> Iterator[tuple[Any, View, tuple[int, int]]]:
        """(raw outputs, view, its height and width) of one member: once, or for each view and dropout pass.

        Args:
            k: Number of the member.
            images: (N, 3, H, W), normalised as the bundle's input says.
            image_ids: Of the images; they decide what dropout drops.
            full_batch: (height, width) -> images of a full batch of that size: only those run compiled.
        """
        images = self.renormalise(k, images)
        for number, view in self.passes:
            with self._seeded(f"{k} {number} {image_ids[0]}"):
                shown = view.apply(images, self.stride)
                yield self._run(k, shown, full_batch), view, (shown.shape[-2], shown.shape[-1])

    def _run(self, k: int, images: Tensor, full_batch: Callable[[int, int], int]) -> Any:
        """Member ``k``'s outputs for (N, 3, H, W), seen whole or through windows."""
        height, width = images.shape[-2:]
        module, window = self.modules[k], self.input.size
        with autocast(self.device, self.precision):
            if self.input.fit == "crop" and needs_sliding_window(self.inference, (height, width), window):
                return sliding_window_logits(module, images, window, self.inference.window_overlap)
            # The odd batch at the end of a unit is not worth compiling for.
            if self._compiled is not None and len(images) == full_batch(height, width):
                return self._compiled[k](images)
            return module(images)

    @contextlib.contextmanager
    def _seeded(self, key: str) -> Iterator[None]:
        """What dropout drops depends on the images shown, not on what was shown before."""
        if not self.inference.dropout_passes:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1)
            yield
