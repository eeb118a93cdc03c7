"""The host's memory: how much there is, and giving back what was taken."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Where control groups (versions 2 and 1) say what a container may take.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Where the system does not say.
_UNKNOWN = 8 << 30


@cache
def default_limit() -> int:
    """Bytes that a save may hold in host copies where nothing else is asked for: a quarter of the memory."""
    total = _UNKNOWN
    with contextlib.suppress(ValueError, OSError, AttributeError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            total = min(total, int(file.read()))  # "max" is no number
    return total // 4


def give_back() -> None:
    """Returns freed memory to the system, where the C library keeps it.

    glibc keeps it for the thread that asked for it, and each save runs in a thread of its own, so that ten
    saves in a row would take ten times the memory of one. Takes some milliseconds.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
