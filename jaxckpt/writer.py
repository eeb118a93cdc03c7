"""The background writer: one save writes, one waits, commits come in order, no exit loses one.

Each save has a thread of its own that is not a daemon, started before the call returns: leaving main,
`sys.exit` and an uncaught exception all wait for it (`threading._shutdown` joins such threads), and
nothing has to start a thread while the interpreter shuts down, which Python 3.12 refuses.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxckpt.report import SaveReport


class SaveFuture(Future[SaveReport]):
    """The outcome of a background save: `result(timeout)`, `exception(timeout)`, `done()`,
    `add_done_callback(f)`, as of any `concurrent.futures.Future`. It cannot be cancelled.

    A failure that nobody has asked for is reported at interpreter exit, with a non-zero exit code.
    """  # noqa: D205

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.seen = False

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if super().exception() else "committed"
        return f"<SaveFuture {self.path}: {state}>"

    def result(self, timeout: float | None = None) -> SaveReport:
        """The report, as soon as the checkpoint is durable; raises what made the save fail."""
        try:
            return super().result(timeout)
        finally:
            self.seen = self.seen or self.done()  # an interrupted wait has seen nothing

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What made the save fail, or None."""
        error = super().exception(timeout)
        self.seen = True
        return error

    def cancel(self) -> bool:
        """A save that has its snapshot is never dropped."""
        return False


@dataclass(slots=True)
class _Job:
    future: SaveFuture
    copied: int
    before: _Job | None
    done: threading.Event


class Writer:
    """Runs saves in order, at most two at a time in the system: one that writes and one that waits."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything: a forked child has none of its parent's threads, hence none of its saves."""
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._jobs: list[_Job] = []
        self._failed: list[SaveFuture] = []

    @property
    def busy(self) -> bool:
        """Whether a save of this process is under way."""
        return bool(self._jobs)

    def submit(
        self,
        path: str,
        copies: int,
        memory_limit: int,
        snapshot: Callable[[], tuple[Callable[[], SaveReport], int]],
    ) -> SaveFuture:
        """Waits for room, takes the snapshot, starts the thread.

        Args:
            path: for messages.
            copies: bytes of host copies that the snapshot is expected to make.
            memory_limit: while copies of an earlier save are held, both must fit in this many bytes.
            snapshot: called here, in the caller's thread; returns the rest of the work and the bytes
                that it holds.
        """
        future = SaveFuture(path)
        with self._turn:  # callers that wait are served in order
            with self._changed:
                self._changed.wait_for(lambda: self._has_room(copies, memory_limit))
            work, held = snapshot()
            job = _Job(future, held, self._jobs[-1] if self._jobs else None, threading.Event())
            with self._changed:
                self._jobs.append(job)
            thread = threading.Thread(
                target=self._run, args=(job, work), name=f"jaxckpt: {os.path.basename(path)}", daemon=False
            )
            del work
            try:
                thread.start()
            except BaseException:
                self._finish(job)
                raise
        return future

    def wait(self) -> None:
        """Returns when nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def _has_room(self, copies: int, memory_limit: int) -> bool:
        held = sum(job.copied for job in self._jobs)
        fits = not copies or not held or held + copies <= memory_limit
        return not self._jobs or (len(self._jobs) < 2 and fits)

    def _run(self, job: _Job, work: Callable[[], SaveReport]) -> None:
        if job.before is not None:
            job.before.done.wait()
            job.before = None
        job.future.set_running_or_notify_cancel()
        try:
            report = work()
        except BaseException as error:
            del work
            self._failed.append(job.future)
            self._finish(job)
            job.future.set_exception(error)
        else:
            del work  # lets go of the host copies before anyone is told that there is room
            self._finish(job)
            job.future.set_result(report)

    def _finish(self, job: _Job) -> None:
        with self._changed:
            self._jobs.remove(job)
            job.done.set()
            self._changed.notify_all()

    def unseen(self) -> list[SaveFuture]:
        """Failed saves whose failure nobody has looked at."""
        self._failed = [future for future in self._failed if not future.seen]
        return self._failed


writer = Writer()


def _report_at_exit() -> None:
    # Threads that are no daemons have ended by now. An exit handler cannot set the exit code, so a
    # failure that nobody saw ends the process here, after the handlers that are still to come.
    if writer.busy:  # the wait for the threads was interrupted
        print("jaxckpt: interrupted: the save that was under way is given up", file=sys.stderr)
        _end(130)
    failed = writer.unseen()
    if not failed:
        return
    for future in failed:
        print(f"jaxckpt: saving {future.path} failed: {Future.exception(future)}", file=sys.stderr)
    _end(1)


def _end(code: int) -> NoReturn:
    """Ends the process with this code, after the exit handlers that are still to come."""
    atexit.unregister(_report_at_exit)
    _run_exit_handlers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed: there is nobody left to tell
            stream.flush()
    os._exit(code)


def _run_exit_handlers() -> Any:
    return atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]


atexit.register(_report_at_exit)
os.register_at_fork(after_in_child=writer.reset)
