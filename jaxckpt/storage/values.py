"""Reads values by location: whole chunks, each checked against its digest before a byte of it is used."""

from __future__ import annotations

import errno
import itertools
import math
import os
import stat
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xxhash

from jaxckpt.storage.chunks import DIGEST_BYTES, NO_LEAF, ROW, ChunkTable, Shape, chunk_counts, digest
from jaxckpt.storage.damage import TAIL, Damage, cut_off, differs
from jaxckpt.storage.placing import Array, Bytes, Request, destination, new_array, ravel

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

#: Data files held open from the start, so that pruning the checkpoint does not matter to a reader.
OPEN_FILES = 256
# One preadv fills many arrays that lie one behind the other (5000 of 1 KiB: 10 calls instead of 5000). Holes
# up to a page are read over, so that a run has at most twice as many buffers as chunks (IOV_MAX is 1024).
_HOLE = 4096
_RUN_BYTES = 4 << 20
_RUN_CHUNKS = 500
_SMALL = 256 << 10
# Read and hashed in pieces that are still in the cache when they are hashed.
_PIECE = 1 << 20
_THREADS_FROM = 8 << 20


#: file, offset, index of the request, length, digest
_Small = tuple[int, int, int, int, bytes]


@dataclass(slots=True)
class _Job:
    """One chunk to read: into `into` if it lies in one piece there, else `place` is given a buffer."""

    file: int
    offset: int
    length: int
    digest: bytes
    entry: int
    into: Bytes | None
    place: Callable[[Bytes], None] | None = None


class ValueReader:
    """Reads the values of one checkpoint.

    Usable from several threads. What was opened stays readable when the checkpoint is deleted meanwhile, up
    to `OPEN_FILES` data files; later ones are opened when they are needed.

    Args:
        directory: the checkpoint.
        tables: its chunk tables, decoded.
        names: for each entry the keys of the leaves that it holds, for messages.
    """

    def __init__(
        self, directory: str, tables: Sequence[ChunkTable], names: Sequence[Sequence[str]] = ()
    ) -> None:
        self._directory, self._names = os.fspath(directory), names
        self._files: list[str] = []
        self._tails: list[bytes] = []
        parts: list[tuple[Any, Any]] = []
        for table in tables:
            rows = table.rows[table.rows["leaf"] != NO_LEAF]
            # One numbering for all tables: a file's index, or -1 - t for the tail of table t.
            file = np.where(rows["file"] < 0, -1 - len(self._tails), rows["file"] + len(self._files))
            self._files += table.files
            self._tails.append(table.inline)
            parts.append((file, rows))
        self._index(parts)
        self._open: dict[int, tuple[int, int]] = {}
        self._finalizer = weakref.finalize(self, _close, self._open)
        for index in range(min(len(self._files), OPEN_FILES)):
            try:
                self._open[index] = self._open_file(index)
            except OSError as error:  # told when it is needed, and the other files are whole
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    break

    def _index(self, parts: Sequence[tuple[Any, Any]]) -> None:
        rows = np.concatenate([part for _, part in parts]) if parts else np.empty(0, ROW)
        file = np.concatenate([files for files, _ in parts]) if parts else np.empty(0, np.int64)
        order = np.lexsort((rows["chunk"], rows["leaf"]))
        rows, self._file = rows[order], file[order].tolist()
        self._chunk: list[int] = rows["chunk"].tolist()
        self._offset: list[int] = rows["offset"].tolist()
        self._length: list[int] = rows["length"].tolist()
        digests = rows["digest"].tobytes()
        self._digest = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
        entries, first = np.unique(rows["leaf"], return_index=True)
        starts: list[int] = first.tolist()
        spans = zip(starts, [*starts[1:], len(rows)], strict=False)
        self._rows: dict[int, tuple[int, int]] = dict(zip(entries.tolist(), spans, strict=True))

    def read(
        self, entry: int, chunk_shape: Shape, shape: Shape, dtype: np.dtype[Any], out: Array | None = None
    ) -> Array:
        """One array; see `read_many`."""
        request = Request(entry=entry, chunk_shape=chunk_shape, shape=shape, dtype=dtype, out=out)
        return self.read_many([request])[0]

    def read_many(self, requests: Sequence[Request]) -> list[Array]:
        """The arrays asked for, writable, each with memory of its own (or in its `out`).

        Needs no memory beyond the results but a chunk for each thread, and that only where a chunk is not
        contiguous in its result. Sizes are checked against the tables and the files before any allocation.

        Raises:
            CorruptCheckpointError: a chunk is missing, cut off, or differs from its digest; names every
                damaged leaf and file among those asked for, and no array is handed out.
            OSError: the file system failed.
        """
        damage = Damage(directory=self._directory, names=self._names)
        results: list[Any] = [None] * len(requests)
        small: list[_Small] = []
        large: list[int] = []
        rows, files, offsets, lengths = self._rows, self._file, self._offset, self._length
        for i, (entry, _, shape, dtype, out, region) in enumerate(requests):
            start, stop = rows.get(entry, (0, 0))
            if stop - start == 1 and out is None and region is None:
                length = lengths[start]
                if 0 < length <= _SMALL and length == math.prod(shape) * dtype.itemsize:
                    small.append((files[start], offsets[start], i, length, self._digest[start]))
                    continue
            self._check(requests[i], damage)
            large.append(i)
        damage.check()
        self._read_small(sorted(small), requests, results, damage)
        jobs: list[_Job] = []
        for i in large:
            results[i] = self._plan(requests[i], jobs, damage)
        damage.check()
        jobs.sort(key=lambda job: (job.file, job.offset))
        self._work(jobs, damage)
        damage.check()
        return results

    def close(self) -> None:
        """Closes the data files; reading afterwards opens them again one by one."""
        self._finalizer()
        self._open.clear()

    def __enter__(self) -> ValueReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Deciding what to read

    def _check(self, request: Request, damage: Damage) -> None:
        """Whether the table has every chunk with its right size, and the files are long enough."""
        start, stop = self._rows.get(request.entry, (0, 0))
        counts = chunk_counts(request.shape, request.chunk_shape)
        have, need = stop - start, math.prod(counts)
        if have != need or self._chunk[start:stop] != list(range(need)):
            damage.add(request.entry, f"the chunk table has {have} of its {need} chunks")
            return
        size = math.prod(request.shape) * request.dtype.itemsize
        if sum(self._length[start:stop]) != size:
            have = sum(self._length[start:stop])
            damage.add(request.entry, f"the chunk table has {have} of its {size} bytes")
            return
        for row in range(start, stop):
            file = self._file[row]
            if file in self._open and self._offset[row] + self._length[row] > self._open[file][1]:
                name = self._files[file]
                damage.add(request.entry, f"{name} is cut off at {self._open[file][1]} bytes", name)
                return

    def _plan(self, request: Request, jobs: list[_Job], damage: Damage) -> Array:
        """Makes the array of a request and adds what it takes to fill it."""
        start, _ = self._rows.get(request.entry, (0, 0))
        region = request.region or tuple(slice(0, length) for length in request.shape)
        shape = tuple(max(0, part.stop - part.start) for part in region)
        result = new_array(request, shape)
        if result.size == 0 or result.dtype.itemsize == 0:
            return result
        flat: Bytes = result.reshape(-1).view(np.uint8)
        counts = chunk_counts(request.shape, request.chunk_shape)
        spans = [
            range(part.start // size, -(-part.stop // size))
            for part, size in zip(region, request.chunk_shape, strict=True)
        ]
        for index in itertools.product(*spans):
            row = start + ravel(index, counts)
            into, place, size = destination(request, index, region, result, flat)
            length = self._length[row]
            if length != size:
                damage.add(request.entry, f"the chunk table gives a chunk {length} instead of {size} bytes")
                break
            jobs.append(
                _Job(
                    self._file[row], self._offset[row], length, self._digest[row], request.entry, into, place
                )
            )
        return result

    # Reading

    def _read_small(
        self, small: list[_Small], requests: Sequence[Request], results: list[Any], damage: Damage
    ) -> None:
        """Whole arrays of one small chunk, many in one system call; they come sorted by place."""
        for run in _runs(small):
            name, size, wanted = self._read_run(run)
            for (_, offset, i, length, expected), buffer in zip(run, wanted, strict=True):
                if xxhash.xxh3_128_digest(buffer) == expected and offset + length <= size:
                    results[i] = np.ndarray(requests[i].shape, requests[i].dtype, buffer)
                else:
                    reason = cut_off(name, size) if offset + length > size else differs(name, offset, length)
                    damage.add(requests[i].entry, reason, name)

    def _read_run(self, run: list[_Small]) -> tuple[str, int, list[bytearray]]:
        """Name and size of the run's file, and what it holds for each chunk."""
        file, first = run[0][:2]
        if file < 0:
            tail = memoryview(self._tails[-1 - file])
            return TAIL, len(tail), [bytearray(tail[at : at + length]) for _, at, _, length, _ in run]
        wanted = [bytearray(length) for _, _, _, length, _ in run]
        buffers, position = wanted, first
        if sum(map(len, wanted)) != run[-1][1] + run[-1][3] - first:
            buffers = []
            for (_, offset, _, length, _), buffer in zip(run, wanted, strict=True):
                buffers += [bytearray(offset - position), buffer] if offset > position else [buffer]
                position = offset + length
        with self._file_of(file) as (handle, size):
            if handle >= 0 and not _pread(handle, buffers, first):
                size = os.fstat(handle).st_size
        return self._files[file], size, wanted

    def _work(self, jobs: Sequence[_Job], damage: Damage) -> None:
        """Does all jobs, on several threads where that pays: pread and the digest let go of the GIL."""
        todo = iter(jobs)
        lock = threading.Lock()
        failures: list[BaseException] = []

        def loop() -> None:
            while not failures:
                with lock:
                    job = next(todo, None)
                if job is None:
                    return
                try:
                    self._do(job, damage)
                except BaseException as error:
                    failures.append(error)

        helpers: list[threading.Thread] = []
        if sum(job.length for job in jobs) >= _THREADS_FROM:
            for _ in range(min(_cores(), len(jobs)) - 1):
                thread = threading.Thread(target=loop, name="jaxckpt-read", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no new threads while the interpreter shuts down
                    break
                helpers.append(thread)
        loop()
        for thread in helpers:
            thread.join()
        if failures:
            raise failures[0]

    def _do(self, job: _Job, damage: Damage) -> None:
        if job.file < 0:
            tail = self._tails[-1 - job.file][job.offset : job.offset + job.length]
            value: Bytes = np.frombuffer(tail, np.uint8)
            self._finish(job, value, digest(value), damage)
            return
        with self._file_of(job.file) as (handle, size):
            name = self._files[job.file]
            if job.offset + job.length > size:
                damage.add(job.entry, cut_off(name, size), name)
                return
            value = np.empty(job.length, np.uint8) if job.into is None else job.into
            hasher = xxhash.xxh3_128()
            view = memoryview(cast("Any", value))
            for start in range(0, job.length, _PIECE):
                piece = view[start : start + _PIECE]
                if not _pread(handle, [piece], job.offset + start):
                    damage.add(job.entry, cut_off(name, os.fstat(handle).st_size), name)
                    return
                hasher.update(piece)
            self._finish(job, value, hasher.digest(), damage)

    def _finish(self, job: _Job, value: Bytes, found: bytes, damage: Damage) -> None:
        if found != job.digest:
            name = self._files[job.file] if job.file >= 0 else TAIL
            damage.add(job.entry, differs(name, job.offset, job.length), name)
        elif job.place is not None:
            job.place(value)
        elif job.into is not None and job.into is not value:
            job.into[:] = value

    @contextmanager
    def _file_of(self, index: int) -> Generator[tuple[int, int]]:
        """A data file and its size, or (-1, -1) where it is missing."""
        known = self._open.get(index)
        if known is not None:
            yield known
            return
        try:
            handle, size = self._open_file(index)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
                raise
            yield -1, -1
            return
        try:
            yield handle, size
        finally:
            os.close(handle)

    def _open_file(self, index: int) -> tuple[int, int]:
        """An open file and its size. Never blocks on a pipe that stands there instead."""
        path = os.path.join(self._directory, self._files[index])
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            raise OSError(errno.EISDIR, "not a regular file", path)
        return handle, status.st_size


def _runs(small: Sequence[_Small]) -> Iterator[list[_Small]]:
    """Groups of neighbours that one system call reads."""
    start = end = 0
    for i, (file, offset, _, length, _) in enumerate(small):
        first = small[start]
        near = file == first[0] and 0 <= offset - end <= _HOLE and offset + length - first[1] <= _RUN_BYTES
        if i > start and (not near or i - start >= _RUN_CHUNKS):
            yield list(small[start:i])
            start = i
        end = offset + length
    if small:
        yield list(small[start:])


def _pread(handle: int, buffers: Sequence[memoryview | bytearray], offset: int) -> bool:
    """Fills all buffers from one place. False if the file ends before: it was cut off after it was opened."""
    wanted = sum(len(buffer) for buffer in buffers)
    done = os.preadv(handle, buffers, offset)
    if done == wanted:
        return True
    views = [memoryview(buffer) for buffer in buffers]
    while done > 0:
        offset += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if not views:
            return True
        views[0] = views[0][done:]
        done = os.preadv(handle, views, offset)
    return False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _close(files: dict[int, tuple[int, int]]) -> None:
    for handle, _ in files.values():
        os.close(handle)
    files.clear()
