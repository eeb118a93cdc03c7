"""How a process shows others that it lives, and how they see it: a file that changes every few seconds."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from jaxckpt.storage.process import ProcessId

if TYPE_CHECKING:
    from collections.abc import Callable

#: How often a live process shows that it is.
RENEW_SECONDS = 10.0
#: After how much silence a process elsewhere counts as dead.
DEAD_SECONDS = 60.0


def to_json(process: ProcessId) -> dict[str, str | int]:
    """A process as it stands in a file."""
    return asdict(process)


def from_json(fields: Any) -> ProcessId:
    """The reverse of `to_json`.

    Raises:
        ValueError, KeyError, TypeError: these fields are no process.
    """
    return ProcessId(
        host=str(fields["host"]), boot=str(fields["boot"]), pid=int(fields["pid"]), start=str(fields["start"])
    )


class Watch:
    """What one observer has seen change, by its own clock: clocks of two hosts are never compared."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[object, float, float]] = {}

    def look(self, name: str, mark: object) -> tuple[float, bool]:
        """Compares what ``name`` shows now with the last look at it.

        Returns:
            How many seconds it has been seen without a change, and whether it changed just now: since a
            look that is not longer ago than `DEAD_SECONDS`, otherwise the change may be as old.
        """
        now = self._clock()
        old, since, looked = self._seen.get(name, (None, now, -DEAD_SECONDS))
        changed = old is not None and old != mark
        if changed or old is None:
            since = now
        self._seen[name] = (mark, since, now)
        return now - since, changed and now - looked <= DEAD_SECONDS

    def forget(self, names: set[str]) -> None:
        """Keeps only what is known of these names."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}


class Renewable(Protocol):
    """What shows by a change of its file that its process lives."""

    def renew(self) -> None: ...


class Renewer:
    """One daemon thread that renews what is added, as long as that is referenced elsewhere."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything; a forked child has no thread, and nothing of its parent's to renew."""
        self._items: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, item: Renewable) -> None:
        with self._lock:
            self._items.add(item)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="jaxckpt: lease", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    if threading.main_thread().is_alive():
                        raise
                    return  # the interpreter is shutting down, which starts no threads any more
                self._thread = thread

    def remove(self, item: Renewable) -> None:
        with self._lock:
            self._items.discard(item)

    def _run(self) -> None:
        while True:
            time.sleep(RENEW_SECONDS)
            if not self._renew_all():
                return

    def _renew_all(self) -> bool:
        # A function of its own, so that no name here keeps an item alive while the thread sleeps.
        with self._lock:
            items = list(self._items)
            if not items:
                self._thread = None
        for item in items:
            with contextlib.suppress(OSError):  # a file system that is away for a moment: try again later
                item.renew()
        return bool(items)


renewer = Renewer()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renewer.reset)
