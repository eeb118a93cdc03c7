"""Reads values by location: whole chunks, each checked against its digest before a byte of it is used."""

from __future__ import annotations

import errno
import itertools
import math
import os
import stat
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xxhash
from msgspec import Struct

from jaxckpt.storage.chunks import DIGEST_BYTES, NO_LEAF, ROW, ChunkTable, Shape, chunk_counts, digest
from jaxckpt.storage.damage import TAIL, Damage, cut_off, differs, number_only
from jaxckpt.storage.placing import Array, Bytes, Request, destination, new_array, ravel
from jaxckpt.storage.reads import Part, Run, pread, runs, work

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

#: Data files held open from the start, so that pruning the checkpoint does not matter to a reader.
OPEN_FILES = 256
# A whole array of one chunk of at most so many bytes is read together with its neighbours.
_SMALL = 256 << 10
# Read and hashed in pieces that are still in the cache when they are hashed.
_PIECE = 1 << 20

#: Called with a number of bytes each time that so many more have been read and checked.
Done = Callable[[int], object]


class _Chunk(Struct, frozen=True, gc=False):
    """One chunk to read: into `into` if it lies in one piece there, else `place` is given a buffer."""

    file: int
    offset: int
    nbytes: int
    row: int
    entry: int
    into: Bytes | None
    place: Callable[[Bytes], None] | None


class ValueReader:
    """Reads the values of one checkpoint.

    Usable from several threads. What was opened stays readable when the checkpoint is deleted meanwhile, up
    to `OPEN_FILES` data files; later ones are opened when they are needed.

    Args:
        directory: the checkpoint.
        tables: its chunk tables, decoded.
        names: gives the keys of the leaves that an entry holds, for messages.
    """

    def __init__(
        self,
        directory: str,
        tables: Sequence[ChunkTable],
        names: Callable[[int], Sequence[str]] = number_only,
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
        self._digests: bytes = rows["digest"].tobytes()
        leaf = rows["leaf"]
        starts: list[int] = np.flatnonzero(np.diff(leaf, prepend=~leaf[:1])).tolist()
        spans = zip(starts, [*starts[1:], len(rows)], strict=False)
        self._rows: dict[int, tuple[int, int]] = dict(zip(leaf[starts].tolist(), spans, strict=True))

    def read(
        self, entry: int, chunk_shape: Shape, shape: Shape, dtype: np.dtype[Any], into: Any = None
    ) -> Array:
        """One array; see `read_many`."""
        request = Request(entry=entry, chunk_shape=chunk_shape, shape=shape, dtype=dtype, into=into)
        return self.read_many([request])[0]

    def read_many(self, requests: Sequence[Request], done: Done = int) -> list[Array]:
        """The arrays asked for, writable, each with memory of its own.

        Needs no memory beyond the results but a chunk for each thread, and that only where a chunk is not
        contiguous in its result. Sizes are checked against the tables and the files before any allocation.

        Args:
            requests: which. A result whose memory was given (`Request.into`) lies there and is None here.
            done: called with the bytes of each part once it is read, from any thread, by one at a time.
                Where it raises, reading ends, and this raises the same.

        Raises:
            CorruptCheckpointError: a chunk is missing, cut off, or differs from its digest; names every
                damaged leaf and file among those asked for, and no array is handed out.
            OSError: the file system failed.
        """
        damage = Damage(directory=self._directory, names=self._names)
        results: list[Any] = [None] * len(requests)
        small: list[Part] = []
        large: list[int] = []
        rows, files, offsets, lengths = self._rows, self._file, self._offset, self._length
        for i, request in enumerate(requests):
            start, stop = rows.get(request.entry, (0, 0))
            if stop - start == 1 and request.region is None:
                length = lengths[start]
                if 0 < length <= _SMALL and length == math.prod(request.shape) * request.dtype.itemsize:
                    small.append(Part(files[start], offsets[start], length, i, start))
                    continue
            self._check(request, damage)
            large.append(i)
        damage.check()
        jobs: list[Run | _Chunk] = list(runs(sorted(small)))
        for i in large:
            results[i] = self._plan(requests[i], jobs, damage)
        damage.check()
        jobs.sort(key=lambda job: (job.file, job.offset))

        def do(job: Run | _Chunk) -> None:
            if isinstance(job, Run):
                self._read_run(job, requests, results, damage)
            else:
                self._read_chunk(job, damage)

        work(jobs, do, done)
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

    def _plan(self, request: Request, jobs: list[Run | _Chunk], damage: Damage) -> Array | None:
        """Makes the array of a request, unless its memory is given, and adds what it takes to fill it."""
        start, _ = self._rows.get(request.entry, (0, 0))
        region = request.region or tuple(slice(0, length) for length in request.shape)
        shape = tuple(max(0, part.stop - part.start) for part in region)
        result = new_array(request, shape)
        given = None if request.into is not None else result
        if result.size == 0 or result.dtype.itemsize == 0:
            return given
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
            jobs.append(_Chunk(self._file[row], self._offset[row], length, row, request.entry, into, place))
        return given

    # Reading

    def _read_run(self, run: Run, requests: Sequence[Request], results: list[Any], damage: Damage) -> None:
        """Whole arrays of one small chunk, many in one system call."""
        wanted: list[Any] = []
        for part in run.parts:
            into = requests[part.request].into
            wanted.append(bytearray(part.length) if into is None else into)
        name, size = self._fill_run(run, wanted)
        check, digests = xxhash.xxh3_128_digest, self._digests
        for part, buffer in zip(run.parts, wanted, strict=True):
            at, end, request = part.row * DIGEST_BYTES, part.offset + part.length, requests[part.request]
            if check(buffer) != digests[at : at + DIGEST_BYTES] or end > size:
                reason = cut_off(name, size) if end > size else differs(name, part.offset, part.length)
                damage.add(request.entry, reason, name)
            elif request.into is None:
                results[part.request] = np.ndarray(request.shape, request.dtype, buffer)

    def _fill_run(self, run: Run, wanted: list[Any]) -> tuple[str, int]:
        """Reads a run into a buffer for each part. Name and size of its file."""
        if run.file < 0:
            tail = memoryview(self._tails[-1 - run.file])
            for part, buffer in zip(run.parts, wanted, strict=True):
                memoryview(buffer).cast("B")[:] = tail[part.offset : part.offset + part.length]
            return TAIL, len(tail)
        with self._file_of(run.file) as (handle, size):
            if handle >= 0 and not run.read(handle, wanted):
                size = os.fstat(handle).st_size
        return self._files[run.file], size

    def _read_chunk(self, job: _Chunk, damage: Damage) -> None:
        if job.file < 0:
            tail = self._tails[-1 - job.file][job.offset : job.offset + job.nbytes]
            value: Bytes = np.frombuffer(tail, np.uint8)
            self._finish(job, value, digest(value), damage)
            return
        with self._file_of(job.file) as (handle, size):
            name = self._files[job.file]
            if job.offset + job.nbytes > size:
                damage.add(job.entry, cut_off(name, size), name)
                return
            value = np.empty(job.nbytes, np.uint8) if job.into is None else job.into
            hasher = xxhash.xxh3_128()
            view = memoryview(cast("Any", value))
            for start in range(0, job.nbytes, _PIECE):
                piece = view[start : start + _PIECE]
                if not pread(handle, [piece], job.offset + start, len(piece)):
                    damage.add(job.entry, cut_off(name, os.fstat(handle).st_size), name)
                    return
                hasher.update(piece)
            self._finish(job, value, hasher.digest(), damage)

    def _finish(self, job: _Chunk, value: Bytes, found: bytes, damage: Damage) -> None:
        if found != self._digests[job.row * DIGEST_BYTES : (job.row + 1) * DIGEST_BYTES]:
            name = self._files[job.file] if job.file >= 0 else TAIL
            damage.add(job.entry, differs(name, job.offset, job.nbytes), name)
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


def _close(files: dict[int, tuple[int, int]]) -> None:
    for handle, _ in files.values():
        os.close(handle)
    files.clear()
