"""Memory for pixels that is used again once nobody refers to it.

Fresh memory of a megabyte and more comes from the system page by page, zeroed, which costs more than decoding or
resizing into it: 0.9 ms instead of 0.2 for one image of 512 x 512 (``python -m benchmarks.speed.feed --profile``).
"""

import sys
import threading
from typing import Final

import numpy as np

MIN_POOLED_BYTES: Final = 2**16
"""Bytes; below, ``malloc`` keeps memory itself."""
SIZES_PER_OCTAVE: Final = 4
"""Sizes between two powers of two, so that images of nearly one size share their memory."""


class Buffers:
    """Hands out arrays and takes them back by itself: one is free when nothing refers to its memory any more.

    Args:
        most: Bytes that are kept; beyond, memory is ordinary.
    """

    def __init__(self, most: int = 2**29) -> None:
        self.max_bytes, self.held = most, 0
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, *shape: int) -> np.ndarray:
        """An uninitialised uint8 array, contiguous, that nobody else holds."""
        count = int(np.prod(shape, dtype=np.int64))
        if count < MIN_POOLED_BYTES:
            return np.empty(shape, np.uint8)
        size = _rounded_up(count)
        with self._lock:
            held = self._free.setdefault(size, [])
            for at in range(len(held)):
                # One reference from the list, one from the call: views, and tensors made of them, count as more.
                if sys.getrefcount(held[at]) == 2:
                    # Last used, first looked at next time: it may still be in the cache.
                    held.insert(0, held.pop(at))
                    return held[0][:count].reshape(shape)
            whole = np.empty(size, np.uint8)
            if self.held + size <= self.max_bytes:
                self.held += size
                held.insert(0, whole)
        return whole[:count].reshape(shape)


def _rounded_up(count: int) -> int:
    """The next of ``STEPS`` sizes between two powers of two."""
    step = max(MIN_POOLED_BYTES, 1 << (count - 1).bit_length()) // (2 * SIZES_PER_OCTAVE)
    return -(-count // step) * step
