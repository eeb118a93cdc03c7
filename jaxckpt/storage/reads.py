"""Reading bytes of files: many small values in one call, much of it on several threads."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

# One preadv fills many arrays that lie one behind the other (5000 of 1 KiB: 10 calls instead of 5000). Holes
# up to a page are read over, so that a run has at most twice as many buffers as parts (IOV_MAX is 1024).
_HOLE = 4096
_RUN_BYTES = 4 << 20
_RUN_PARTS = 500
_THREADS_FROM = 8 << 20


class Part(Struct, frozen=True, gc=False, order=True):
    """A value that is read in one piece: where it lies, which request it is for, and its row of the table."""

    file: int
    offset: int
    length: int
    request: int
    row: int


class Run(Struct, frozen=True, gc=False):
    """Parts that lie one behind the other, with small holes between them.

    Attributes:
        file: where they are.
        offset: of the first.
        length: from the first byte of the first to the last byte of the last.
        nbytes: of the parts alone.
        parts: sorted by place.
    """

    file: int
    offset: int
    length: int
    nbytes: int
    parts: Sequence[Part]

    def read(self, handle: int, buffers: Sequence[Any]) -> bool:
        """Fills a buffer for each part. False if the file ends before."""
        if self.nbytes != self.length:
            position, buffers, parts = self.offset, [], zip(self.parts, buffers, strict=True)
            for part, buffer in parts:
                buffers += [bytearray(part.offset - position), buffer] if part.offset > position else [buffer]
                position = part.offset + part.length
        return pread(handle, buffers, self.offset, self.length)


def runs(parts: Sequence[Part]) -> Iterator[Run]:
    """Groups of neighbours that one system call reads; parts come sorted."""
    start = first = end = nbytes = 0
    for i, part in enumerate(parts):
        near = part.file == parts[start].file and 0 <= part.offset - end <= _HOLE
        if i and (not near or part.offset + part.length - first > _RUN_BYTES or i - start >= _RUN_PARTS):
            yield Run(parts[start].file, first, end - first, nbytes, parts[start:i])
            start, nbytes = i, 0
        if i == start:
            first = part.offset
        end = part.offset + part.length
        nbytes += part.length
    if parts:
        yield Run(parts[start].file, first, end - first, nbytes, parts[start:])


def pread(handle: int, buffers: Sequence[Any], offset: int, wanted: int) -> bool:
    """Fills all buffers from one place.

    Args:
        handle: an open file.
        buffers: writable, of `wanted` bytes together.
        offset: in the file.
        wanted: how many bytes.

    Returns:
        False if the file ends before: it was cut off after it was opened.
    """
    done = os.preadv(handle, buffers, offset)
    if done == wanted:
        return True
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    while done > 0:
        offset += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if not views:
            return True
        views[0] = views[0][done:]
        done = os.preadv(handle, views, offset)
    return False


class Job(Protocol):
    """What is to be read."""

    @property
    def nbytes(self) -> int:
        """In bytes."""
        ...


_J = TypeVar("_J", bound=Job)
_T = TypeVar("_T")


def work(jobs: Sequence[_J], do: Callable[[_J], None], done: Callable[[int], object]) -> None:
    """Does all jobs, on several threads where that pays: reading and the digest let go of the GIL.

    Args:
        jobs: in the order in which they are begun.
        do: does one.
        done: called with the bytes of each that has been done, from any of the threads, by one at a time.

    Raises:
        BaseException: what a job or `done` raised first; what is not begun then is not done.
    """
    todo = iter(jobs)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while not failures:
                with lock:
                    job = next(todo, None)
                if job is None:
                    return
                do(job)
                with lock:
                    if not failures:
                        done(job.nbytes)
        except BaseException as error:
            failures.append(error)

    large = sum([job.nbytes for job in jobs]) >= _THREADS_FROM
    helpers = _started(loop, min(cores(), len(jobs)) - 1 if large else 0)
    loop()
    for thread in helpers:
        while thread.is_alive():  # nothing is written any more when this returns, nor after Ctrl-C
            try:
                thread.join()
            except BaseException as error:
                failures.append(error)
    if failures:
        raise failures[0]


def _started(loop: Callable[[], None], count: int) -> list[threading.Thread]:
    """Threads that run it; fewer where the interpreter ends and starts no more."""
    threads: list[threading.Thread] = []
    with contextlib.suppress(RuntimeError):
        for _ in range(count):
            thread = threading.Thread(target=loop, name="jaxckpt-read", daemon=True)
            thread.start()
            threads.append(thread)
    return threads


def ahead(calls: Sequence[Callable[[], _T]]) -> Generator[_T]:
    """What the calls return, in order; each is made in a thread while the result before it is in use."""
    coming: Future[_T] | None = None
    try:
        for number, call in enumerate(calls):
            result = call() if coming is None else coming.result()
            coming = _soon(calls[number + 1]) if number + 1 < len(calls) else None
            yield result
    finally:
        if coming is not None:  # given up: nothing goes on behind the caller's back
            wait([coming])


def _soon(call: Callable[[], _T]) -> Future[_T] | None:
    """The call's result to come; None where it has to be made in turn."""
    coming = Future[_T]()

    def run() -> None:
        try:
            coming.set_result(call())
        except BaseException as error:
            coming.set_exception(error)

    return coming if _started(run, 1) else None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
