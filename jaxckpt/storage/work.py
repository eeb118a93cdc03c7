"""Writes under way, in the form in which Orbax waits for them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from etils import epath


class Done:
    """The future of what is done."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self, timeout: float | None = None) -> Any:
        del timeout
        return self._value

    def cancel(self) -> bool:
        return False


@dataclass
class Work:
    """The future of a write in a thread, which ends with the write and not before the interpreter does."""

    work: Callable[[Callable[[epath.Path], None]], None]
    timeout: float
    error: BaseException | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="jaxckpt-orbax-write", daemon=False)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work(self._wait)
        except BaseException as error:
            self.error = error

    def _wait(self, parent: epath.Path) -> None:
        """Waits until Orbax has made the directory, which its asynchronous savers do meanwhile."""
        end = time.monotonic() + self.timeout
        while not parent.exists():
            if self.cancelled.wait(0.01):
                raise SaveError(f"the save into {parent} was cancelled")
            if time.monotonic() > end:
                raise SaveError(f"Orbax did not make the directory {parent} within {self.timeout:g} s")

    def result(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise TimeoutError(f"the arrays were not written within {timeout} s")
        if self.error is not None:
            raise self.error

    def cancel(self) -> bool:
        """Gives up the wait for the directory; a write that has begun is finished."""
        self.cancelled.set()
        return True
