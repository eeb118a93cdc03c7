"""Host memory that values pass through on their way to a device, used again and again. Pure."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

# The CPU client shows host memory at multiples of this address in place of copying it: then the array could
# not be donated, and would change with the host memory.
_ALIGNMENT = 64


class Slab:
    """One piece of memory, as large as the most that was asked of it.

    (Fresh memory costs more than what is copied into it: the system has to clear each page first.) It comes
    from the system and goes back there as a whole: what the allocator keeps of threads that end would add up.
    """

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def cut(self, sizes: Sequence[int]) -> list[memoryview]:
        """Writable parts of these sizes in bytes, good until the next call.

        They begin at multiples of 16 bytes that no device takes over.
        """
        needed = sum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]) + 2 * _ALIGNMENT
        if len(self._memory) < needed:
            self._memory = memoryview(b"")  # so that there are never two
            self._memory = memoryview(mmap.mmap(-1, needed))
        start = -np.frombuffer(self._memory, np.uint8).ctypes.data % _ALIGNMENT + _ALIGNMENT // 4
        parts: list[memoryview] = []
        for size in sizes:
            parts.append(self._memory[start : start + size])
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        return parts
