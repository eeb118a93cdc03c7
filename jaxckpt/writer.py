"""The background writer: one save writes, one waits, commits come in order, no exit loses one.

Each save has a thread of its own that is not a daemon, started before the call returns. Where no thread can
be had (the interpreter is shutting down), or nobody would wait for it (an exit handler, or a daemon thread
that outlives the main one, is saving), the call itself does the work.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from jaxckpt.errors import SaveError
from jaxckpt.exits import guard, in_main_thread, main_has_ended, tell_of_failures
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


Work = Callable[[], SaveReport]
_LINGER_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class _Job:
    future: SaveFuture
    work: Work | None  # until it has begun, or was dropped
    held: int
    go: threading.Event = field(default_factory=threading.Event)
    thread: int = 0


class Writer:
    """Runs saves in order, at most two at a time in the system: one that writes and one that waits.

    Args:
        on_first: called with the writer at its first save.
    """

    def __init__(self, on_first: Callable[[Writer], object] | None = None) -> None:
        self._on_first = on_first
        self.reset()

    def reset(self) -> None:
        """Forgets everything: a forked child has none of its parent's threads, hence none of its saves."""
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._jobs: list[_Job] = []
        self._failed: list[SaveFuture] = []
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a save of this process is under way."""
        return bool(self._jobs)

    def under_way(self) -> tuple[SaveFuture, ...]:
        """The saves of this process that have their snapshot and have not ended."""
        with self._changed:
            return tuple(job.future for job in self._jobs)

    def wait(self, saves: Sequence[SaveFuture], timeout: float) -> bool:
        """Returns when none of these is under way, or after so many seconds: whether none is."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(job.future in saves for job in self._jobs), timeout)

    def close(self) -> None:
        """No other thread than the main one begins a save any more, and what fails there is told at once."""
        with self._changed:
            self._closed = True

    def submit(
        self,
        path: str,
        nbytes: int,
        memory_limit: int,
        snapshot: Callable[[], tuple[Work, int]],
    ) -> SaveFuture:
        """Waits for room, takes the snapshot, starts the thread.

        Args:
            path: for messages.
            nbytes: of host memory that the snapshot is expected to hold on to.
            memory_limit: while an earlier save holds memory, both must fit in this many bytes.
            snapshot: called here, in the caller's thread; returns the rest of the work and the bytes of host
                memory that it holds: copies, and views too, which keep alive what the program gives up.

        Raises:
            RuntimeError: called by the work of another save.
        """
        if self._on_first is not None:
            on_first, self._on_first = self._on_first, None
            on_first(self)
        if any(job.thread == threading.get_ident() for job in self._jobs):
            raise RuntimeError(
                f"{path} is to be saved from inside another save (by a function given as keep=, metric= or "
                "progress=), which would wait for itself: save it afterwards"
            )
        future = SaveFuture(path)
        with self._turn:  # callers that wait are served in order
            with self._changed:
                self._changed.wait_for(lambda: self._has_room(nbytes, memory_limit))
            job = _Job(future, *snapshot())
            try:
                begun = self._begin(job)
            finally:
                job.go.set()
        if not begun:
            # As every thread that goes on while the interpreter ends, this one is about to be stopped: no
            # traceback of it need be seen. Unless an exit handler waits for it.
            time.sleep(_LINGER_SECONDS)
            raise SaveError(f"{path} is not saved: the program has ended, but for this thread")
        return future

    def fail(self, path: str, error: Exception) -> SaveFuture:
        """A failure beside a save, told in the end like that of one."""
        future = SaveFuture(path)
        future.set_exception(error)
        self._note(future)
        return future

    def unseen(self) -> list[SaveFuture]:
        """Failed saves whose failure nobody has looked at."""
        return [future for future in self._failed if not future.seen]

    def _has_room(self, nbytes: int, memory_limit: int) -> bool:
        held = sum(job.held for job in self._jobs)
        fits = not nbytes or not held or held + nbytes <= memory_limit
        return not self._jobs or (len(self._jobs) < 2 and fits)

    def _begin(self, job: _Job) -> bool:
        """Starts a save, or makes it; False when it is too late for that."""
        thread = threading.Thread(
            target=self._run, args=(job,), name=f"jaxckpt: {os.path.basename(job.future.path)}", daemon=False
        )
        here = main_has_ended() and (in_main_thread() or threading.current_thread().daemon)
        try:
            with self._changed:
                if self._closed and not in_main_thread():
                    return False
                self._jobs.append(job)
            if not here:
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down, or the system has no more of them
                    here = True
            if here:
                self._run(job, here=True)
        except BaseException:  # a Ctrl-C: the call fails, and so does its save, unless that has begun
            with self._changed:
                begun, job.work = job.work is None, None
            if not begun:
                self._finish(job)
            raise
        return True

    def _run(self, job: _Job, *, here: bool = False) -> None:
        if not here:
            job.go.wait()  # a new thread has the interpreter for 5 ms, for which the caller would wait
        with self._changed:
            work, job.work = job.work, None
            job.thread = threading.get_ident()
        if work is None:
            return
        job.future.set_running_or_notify_cancel()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs[0] is job)
            report = work()
        except BaseException as error:
            del work
            _let_go_of_locals(error)
            self._note(job.future)
            self._finish(job)
            job.future.set_exception(error)
            if self._closed and in_main_thread():
                tell_of_failures(self)  # nobody else will
            if here and not isinstance(error, Exception):
                raise
        else:
            del work  # lets go of the host copies before anyone is told that there is room
            self._finish(job)
            job.future.set_result(report)

    def _finish(self, job: _Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._changed.notify_all()

    def _note(self, failed: SaveFuture) -> None:
        with self._changed:
            self._failed = [*self.unseen(), failed]


def _let_go_of_locals(error: BaseException | None) -> None:
    """Frees the values that a failed save held: whoever keeps the error keeps its lines, not its memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


writer = Writer(guard)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=writer.reset)
