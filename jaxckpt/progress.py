"""How far a save or a restore is: a callback, or a bar where somebody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

Report = Callable[[int, int], object]
Progress = Report | bool | None


def silent(done: int, total: int) -> None:
    """Tells nobody."""
    del done, total


@contextmanager
def shown(progress: Progress, title: str) -> Generator[Report]:
    """Yields what to call with (bytes done, bytes in all).

    Args:
        progress: a function to call, or True for a bar in a terminal or notebook; nothing in a log.
        title: what the bar says.
    """
    if callable(progress):
        yield progress
    elif progress and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = (title, BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            yield show
    else:
        yield silent
