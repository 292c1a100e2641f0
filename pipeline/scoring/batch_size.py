"""How many images go through the members at once: as many as fit into memory, unless it is set."""

import contextlib
import logging
import os
from pathlib import Path

import pyarrow as pa
import torch

log = logging.getLogger(__name__)

PIXELS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Most pixels of all images in one batch, by kind of device: 1 image of 512 x 512 on a CPU, 64 on a GPU. Larger
batches are no faster: on a CPU they leave its cache (a U-Net did 6.1 images a second one by one, 4.6 by eights), on a
GPU all its units are busy."""
IMAGES_AT_ONCE = 256
FIRST_IMAGES = 4
"""Images of the first batch on a GPU, by which the memory for a pixel is measured."""
SHARE = 0.6
"""Of the free memory: the rest is for the batches before and after, for fragments, and for whoever else is there."""
CPU_BYTES_A_PIXEL = 4096
"""Taken for granted on CPUs, where running out of memory ends the process: activations of a wide U-Net with a
ResNet-50 take half of it (16 maps of 64 channels in float32 are 4096 bytes)."""


class BatchSize:
    """Grows no further than memory allows, and halves when that was not enough.

    Args:
        device: Where the members are.
        images: Fixed number of images; None = found by memory. Out of memory halves it too.
        calls: Batches in memory at the same time.
    """

    def __init__(self, device: torch.device, images: int | None = None, calls: int = 1) -> None:
        self.device, self.fixed = device, images
        self._limit: float = PIXELS_AT_ONCE.get(device.type, PIXELS_AT_ONCE["cpu"])
        self.measured = device.type != "cuda" or images is not None
        if images is not None:
            self._limit = float("inf")
        elif device.type == "cpu":
            self._limit = min(self._limit, SHARE * free_memory() / (CPU_BYTES_A_PIXEL * calls))

    def images(self, height: int, width: int) -> int:
        """Images of that size in one batch, at least one."""
        fitting = self._limit // max(1, height * width)
        if self.fixed is not None:
            return int(max(1, min(self.fixed, fitting)))
        return int(max(1, min(IMAGES_AT_ONCE if self.measured else FIRST_IMAGES, fitting)))

    def set_from_measurement(self, pixels: int, used: int, free: int) -> None:
        """Set the size by what a first batch of ``pixels`` took, ``used`` bytes, of ``free`` bytes."""
        if self.measured or not pixels:
            return
        self.measured = True
        self._limit = min(self._limit, SHARE * free * pixels / max(1, used))
        log.info("%.0f bytes a pixel, %d bytes free: %.0f pixels in a batch", used / pixels, free, self._limit)

    def halve(self, pixels: int) -> None:
        """A batch of ``pixels`` did not fit."""
        self._limit, self.measured = min(self._limit, pixels / 2), True
        log.warning("a batch of %d pixels did not fit into memory: at most %.0f from now on", pixels, self._limit)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class MeasurePeakMemory:
    """Around the first batch on a GPU: notes the most memory that it held at once."""

    def __init__(self, size: BatchSize, pixels: int) -> None:
        self.size, self.pixels, self.before = size, pixels, 0

    def __enter__(self) -> None:
        if not self.size.measured:
            torch.cuda.reset_peak_memory_stats(self.size.device)
            self.before = torch.cuda.memory_allocated(self.size.device)

    def __exit__(self, kind: object, *_: object) -> None:
        device = self.size.device
        if self.size.measured or kind is not None:
            return
        used = torch.cuda.max_memory_allocated(device) - self.before
        # What the allocator holds and nobody uses is as good as free.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        self.size.set_from_measurement(self.pixels, used, torch.cuda.mem_get_info(device)[0] + cached)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of this process."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, pa.ArrowMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory")
"""How torch says it of the host, without a class of its own."""


def free_memory() -> float:
    """Bytes that this process may still take on the host: of the machine, or of its control group."""
    limits = [float("inf")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        limits.append(max(0.0, limit - used))
    if len(limits) == 1 and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE") / 2)
    return min(limits)
