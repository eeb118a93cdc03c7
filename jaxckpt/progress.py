"""How far a save or a restore is: a callback, or a bar where somebody looks."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Report = Callable[[int, int], object]
Progress = Report | bool | None

# Told no more often: a file of many small values would call back more than it reads.
_STEP = 4 << 20
_SECONDS = 0.1


def silent(done: int, total: int) -> None:
    """Tells nobody."""
    del done, total


class Meter:
    """Adds up bytes and tells of it: (0, total) first, (total, total) last, never less than before.

    For one thread at a time.

    Args:
        report: called with (bytes done, bytes in all); what it raises goes through.
        total: bytes in all.
    """

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total = report, total
        self._done = self._told = 0
        report(0, total)

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        self._done += nbytes
        if self._told + _STEP <= self._done < self._total:
            self._told = self._done
            self._report(self._done, self._total)

    def finish(self) -> None:
        """All are done."""
        self._report(self._total, self._total)


def shown(progress: Progress, title: str) -> AbstractContextManager[Report]:
    """Gives what to call with (bytes done, bytes in all).

    Args:
        progress: a function to call, or True for a bar in a terminal or notebook; nothing in a log.
        title: what the bar says.
    """
    if callable(progress):
        return nullcontext(progress)
    if not progress:
        return nullcontext(silent)
    if _in_notebook():
        return _notebook_bar(title)
    return _terminal_bar(title) if sys.stderr.isatty() else nullcontext(silent)


# In a terminal: one display for all bars, since two would write over one another.

_lock = threading.Lock()
_display: Any = None
_bars = 0


@contextmanager
def _terminal_bar(title: str) -> Generator[Report]:
    global _display, _bars
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    with _lock:
        if _display is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            _display = Progress(*columns, console=Console(stderr=True))
            _display.start()
        display = _display
        _bars += 1
        task = display.add_task(title, total=None)
    try:
        yield lambda done, total: display.update(task, completed=done, total=total)
    finally:
        with _lock:
            display.stop_task(task)
            _bars -= 1
            if not _bars:
                _display = None
                display.stop()


# In a notebook: an element of HTML, for which nothing needs to be installed (rich asks for ipywidgets).


def _in_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class _Bar:
    """What a notebook shows; as text elsewhere."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self.title, self.done, self.total = title, done, total

    def __repr__(self) -> str:
        return f"{self.title}: {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB"

    def _repr_html_(self) -> str:
        return f"<div>{self!r} <progress value='{self.done}' max='{max(1, self.total)}'></progress></div>"


@contextmanager
def _notebook_bar(title: str) -> Generator[Report]:
    from IPython.display import display  # pyright: ignore[reportUnknownVariableType]

    handle: Any = display(_Bar(title, 0, 0), display_id=True)
    last = 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS or done == total:
            last = now
            handle.update(_Bar(title, done, total))

    yield show
