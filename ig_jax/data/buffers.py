"""Memory of batches, used again once nothing refers to it any more.

A batch of 256 latents takes 8 MB, and so do those read ahead. Fresh memory costs one page fault for every 4 kB, which
takes longer than copying the latents into it.
"""

import ctypes
import math
import mmap
import weakref
from collections import defaultdict

import numpy as np


class Buffers:
    """Arrays whose memory comes back when the last array, view or device buffer on it is gone."""

    def __init__(self):
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)  # by bytes; append and pop are atomic

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of these, C-contiguous; its numbers are undefined."""
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Every array on the memory refers to this view of it, and it outlives them all.
        view = (ctypes.c_ubyte * size).from_buffer(memory)
        weakref.finalize(view, free.append, memory).atexit = False
        return np.frombuffer(memoryview(view), dtype, math.prod(shape)).reshape(shape)
