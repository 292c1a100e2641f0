"""Pixels: warp, colour and normalisation of a batch, whole on a GPU (compiled) and a few images at a time on a CPU.

Pure functions of tensors, the same on every device. In between, images are float32 on the 0..255 scale less the mean
colour, so that what lies outside an image is 0.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.augment.colour import apply_colour
from pipeline.runtime.compiled import CompileFallback, compile_static
from pipeline.schema import VOID

log = logging.getLogger(__name__)

MAX_SHAPES: Final = 4
"""Kinds of batches that one function is compiled for, which takes seconds each; further ones run uncompiled."""
MAX_CHUNK: Final = 8
"""Most images of one step on a CPU: beyond, their planes fit no cache, and malloc maps them anew each time."""

Pair = tuple[Tensor, Tensor | None]
"""Images and, where there are any, masks."""


def copy_to_device(values: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Numbers from the host by one copy that nothing waits for; float64 wherever the device has it."""
    total = sum(value.size for value in values.values())
    dtype = torch.float32 if device.type == "mps" else torch.float64
    packed = torch.empty(total, dtype=dtype, pin_memory=device.type == "cuda")
    if total:
        np.concatenate([value.reshape(-1) for value in values.values()], out=packed.numpy(), casting="unsafe")
    pieces = packed.to(device, non_blocking=True).split([value.size for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), pieces, strict=True)}


def less_mean(images: Tensor, mean: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 as float32 less ``mean`` (3,), both on the 0..255 scale; the layout stays."""
    planes = images.float()
    view, values = _broadcast_along_rows(planes, mean)
    view.sub_(values)
    return planes


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _broadcast_along_rows(images: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both (N, 3, H, W) and (3,) so viewed that they broadcast along long rows, whatever the layout."""
    if _is_channels_last(images):
        return images.permute(0, 2, 3, 1).flatten(2), values.repeat(images.shape[-1])
    return images, values[:, None, None]


def sampling_grid(theta: Tensor, size: tuple[int, int]) -> Tensor:
    """What ``affine_grid(theta, (N, _, *size), align_corners=False)`` gives, by a sum instead of a product.

    Args:
        theta: (N, 2, 3) float32.
        size: Height and width of the output.

    Returns:
        (N, *size, 2).
    """
    rows, columns = (torch.arange(1 - n, n, 2, device=theta.device, dtype=theta.dtype) / n for n in size)
    across = columns[:, None] * theta[:, None, :, 0]
    down = rows[:, None] * theta[:, None, :, 1] + theta[:, None, :, 2]
    if theta.is_cpu and not torch.compiler.is_compiling():
        # One complex number a pixel: sums along rows of two numbers take five times as long.
        return torch.view_as_real(torch.view_as_complex(across)[:, None] + torch.view_as_complex(down)[:, :, None])
    return across[:, None] + down[:, :, None]


def resample(images: Tensor, masks: Tensor | None, grid: Tensor) -> Pair:
    """One bilinear resampling of the images and one nearest of the masks.

    Args:
        images: (N, 3, H, W) float32; outside is 0.
        masks: (N, H, W) uint8 or None; outside is VOID.
        grid: (N, *size, 2) as ``grid_sample`` takes it.

    Returns:
        (N, 3, *size) and (N, *size).
    """
    out = grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out, None if masks is None else nearest(void_is_zero(masks), grid)


def void_is_zero(masks: Tensor) -> Tensor:
    """(N, H, W) uint8 as (N, 1, H, W) float32 for ``nearest``: sampling outside gives 0, so VOID travels as 0."""
    return (masks ^ VOID)[:, None].float()


def nearest(shifted: Tensor, grid: Tensor) -> Tensor:
    """(N, *size) uint8 out of what ``void_is_zero`` made."""
    sampled = grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled[:, 0].to(torch.uint8) ^ VOID


def sample(images: Tensor, masks: Tensor | None, theta: Tensor | None, norm: Tensor, size: tuple[int, int]) -> Pair:
    """Canvases -> images and masks of ``size``, before any colour.

    Args:
        images: (N, 3, H, W) uint8.
        masks: (N, H, W) uint8 or None.
        theta: (N, 2, 3) from ``sampling_theta``; None: nothing moves, and the centre is cut out by whole pixels.
        norm: (2, 3) mean and standard deviation of the normalisation, on the 0..1 scale.
        size: Height and width of the output.
    """
    mean = norm[0] * 255
    if theta is not None:
        return resample(less_mean(images, mean), masks, sampling_grid(theta.float(), size))
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    return less_mean(images[..., rows, columns], mean), None if masks is None else masks[:, rows, columns]


def normalise(images: Tensor, matrix: Tensor | None, offset: Tensor | None, norm: Tensor) -> Tensor:
    """Colour, cut off at black and white, and normalisation; in place where that is possible.

    Args:
        images: (N, 3, H, W) float32 of ``sample``.
        matrix: (N, 3, 3): colours of ``sample`` -> colours on the 0..1 scale; None: they stay as they are.
        offset: (N, 3) on the 0..1 scale, with ``matrix``.
        norm: As for ``sample``.
    """
    mean, std = norm
    if matrix is None or offset is None:
        view, values = _broadcast_along_rows(images, 1 / (255 * std))
        view.mul_(values)
        return images
    offset = (offset.float() - mean) / std
    return apply_colour(images, matrix.float() / std[:, None], offset, -mean / std, (1 - mean) / std)


def render(
    images: Tensor,
    masks: Tensor | None,
    theta: Tensor | None,
    matrix: Tensor | None,
    offset: Tensor | None,
    norm: Tensor,
    size: tuple[int, int],
) -> Pair:
    """``sample``, then ``normalise``."""
    images, masks = sample(images, masks, theta, norm, size)
    return normalise(images, matrix, offset, norm), masks


def in_row_chunks(function: Callable[..., Any], *rows: Tensor | None, **shared: Any) -> Any:
    """Call a function with arguments of N rows each; on a CPU with few rows at a time.

    There, what one operation writes is in the cache still when the next reads it, and malloc hands out the same
    memory again instead of pages that have to be cleared: three times as fast as whole batches.

    Args:
        function: Of tensors of n rows, to a tensor of as many or a tuple of such; None stays None.
        rows: Tensors of N rows, or None, which is passed on.
        shared: Passed on by name.
    """
    first = next(row for row in rows if row is not None)
    step = min(torch.get_num_threads(), MAX_CHUNK)
    if not first.is_cpu or len(first) <= step:
        return function(*rows, **shared)
    wholes: list[Tensor | None] = []
    is_single = False
    for start in range(0, len(first), step):
        chunk = slice(start, start + step)
        outputs = function(*(None if row is None else row[chunk] for row in rows), **shared)
        is_single = isinstance(outputs, Tensor)
        outputs = (outputs,) if is_single else outputs
        wholes = wholes or [None if output is None else _empty_like(output, len(first)) for output in outputs]
        for whole, output in zip(wholes, outputs, strict=True):
            if whole is not None:
                whole[chunk] = output
    return wholes[0] if is_single else tuple(wholes)


def _empty_like(part: Tensor, count: int) -> Tensor:
    """Room for ``count`` rows of the same shape and layout."""
    layout = torch.channels_last if part.dim() == 4 and _is_channels_last(part) else torch.contiguous_format
    return torch.empty(count, *part.shape[1:], dtype=part.dtype, device=part.device, memory_format=layout)


class BatchFunctions:
    """Runs pure functions of whole batches: compiled on a GPU; elsewhere, and if that fails, in row chunks."""

    def __init__(self, enabled: bool = True, backend: str = "inductor", devices: tuple[str, ...] = ("cuda",)) -> None:
        """``enabled``: false never compiles; ``devices``: types of those where it gains.

        A CPU is none of them: by rows an image took 3.4 ms there, compiled 15.6 (one thread, 512 x 512, torch 2.14),
        since its compiler has no vector instructions for reading scattered pixels.
        """
        self.backend = backend
        self._devices = devices if enabled else ()
        self._fallback = CompileFallback("augmentation", log)
        self._shapes: dict[Callable[..., Any], set[tuple[Any, ...]]] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """Types of the devices on which functions are compiled; none once compiling has failed."""
        return () if self._fallback.failed else self._devices

    def wants_whole_batch(self, images: Tensor) -> bool:
        """Whether to leave batches whole and their shapes as they are, since a kernel is compiled for them."""
        return not images.is_cpu or images.device.type in self.devices

    def __call__(self, function: Callable[..., Any], *rows: Tensor | None, **shared: Any) -> Any:
        """What ``in_row_chunks`` gives for the same arguments."""
        first = next(row for row in rows if row is not None)
        if first.device.type not in self.devices:
            return in_row_chunks(function, *rows, **shared)
        # A static kernel a shape; a few, since compiling takes longer than some batches save.
        shapes = self._shapes.setdefault(function, set())
        shape = tuple(None if row is None else (row.shape, row.stride(), row.dtype) for row in rows)
        if shape not in shapes and len(shapes) >= MAX_SHAPES:
            return in_row_chunks(function, *rows, **shared)
        output = self._fallback.run(
            lambda: _compiled(function, self.backend)(*rows, **shared),
            lambda: in_row_chunks(function, *rows, **shared),
        )
        # Noted after the call: a shape that ran out of memory was not compiled.
        shapes.add(shape)
        return output


@functools.cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """One compiled copy of a function for all users in the process."""
    return compile_static(function, backend, fullgraph=True)
