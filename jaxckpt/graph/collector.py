"""The garbage collector, kept from looking at what cannot be garbage yet."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator


@contextlib.contextmanager
def paused() -> Generator[None]:
    """No cycles are looked for: tens of thousands of values made at once would double their own cost.

    Meant for some tenths of a second. Needs no lock: of two threads the first to end switches it on again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
