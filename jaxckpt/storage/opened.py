"""An opened checkpoint: its manifest, and its values by leaf. Pure but for reading files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError
from jaxckpt.graph.model import ArraySpec, IteratorSpec, ObjectGraph, ValueSpec
from jaxckpt.storage import manifest as manifests
from jaxckpt.storage.chunks import ChunkTable, digest
from jaxckpt.storage.format.dtypes import numpy_dtype
from jaxckpt.storage.format.orbax_files import CHECKPOINT_METADATA, is_ours
from jaxckpt.storage.layout import Entry, bytes_value, names
from jaxckpt.storage.placing import Request
from jaxckpt.storage.values import Done, ValueReader

Owner = tuple[int, ...]
Make = Callable[[Any, ArraySpec], Any]


class OpenCheckpoint:
    """A checkpoint's manifest and chunk tables, checked, and its data files, open.

    Args:
        path: the checkpoint's directory.

    Attributes:
        path: the same, absolute.
        manifest: what it holds.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CorruptCheckpointError: it is not what was written.
        UnsupportedFormatError: it is no checkpoint of ours, or of a later release.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        for last in (*[False] * 99, True):
            seen = _identity(self.path)
            try:
                self._load()
            except CorruptCheckpointError:
                if last or _identity(self.path) == seen:
                    raise
            else:
                if last or _identity(self.path) == seen:
                    break
                self.close()  # an overwriting save exchanged the directory between one file and the next

    def _load(self) -> None:
        self.manifest = manifests.decode(read_manifest(self.path), os.path.join(self.path, manifests.NAME))
        entries, graph = self.manifest.entries, self.manifest.graph
        tables = [self._table(name, expected) for name, expected in self.manifest.files.tables.items()]
        self._values = ValueReader(self.path, tables, lambda index: names(graph, entries[index]))
        self._entries: dict[Owner, int] = {entry.owner: index for index, entry in enumerate(entries)}
        aliases = [(index, entry.aliases) for index, entry in enumerate(entries) if entry.aliases]
        self._entries.update({(alias,): index for index, several in aliases for alias in several})

    @property
    def graph(self) -> ObjectGraph:
        """The named graph."""
        return self.manifest.graph

    def read(
        self,
        leaves: Sequence[int],
        make: Make | None = None,
        *,
        into: Sequence[Any] | None = None,
        done: Done = int,
    ) -> list[Any]:
        """The values of leaves: numpy arrays of their own memory, Python values, iterators' states.

        Args:
            leaves: indices into the graph's.
            make: makes of the array of a spec what it was; called for arrays inside iterators' states.
            into: for each leaf memory for its array, as `placing.Request` has it, or None. The values of
                leaves that have some are not in the result, which has None for them.
            done: called with the bytes of each part that has been read.

        Raises:
            CorruptCheckpointError: what was read is not what was written; names the leaves.
        """
        requests: list[Request] = []
        places: list[int] = []
        others: list[int] = []
        inner: dict[Owner, None] = {}  # within iterators' states
        for i, leaf in enumerate(leaves):
            index = self._entries.get((leaf,))
            if index is not None:
                requests.append(self._request(index, None if into is None else into[i]))
                places.append(i)
            if not isinstance(self.graph.leaves[leaf].spec, ArraySpec):
                others.append(i)
                inner.update(dict.fromkeys(self._inner((leaf,)) if index is None else ()))
        requests += [self._request(self._entries[owner], None) for owner in inner]
        read = self._values.read_many(requests, done)
        results: list[Any] = [None] * len(leaves)
        for i, value in zip(places, read, strict=False):
            results[i] = value
        states: dict[Owner, Any] = dict(zip(inner, read[len(places) :], strict=True))
        for i in others:
            owner = (leaves[i],)
            stored = states if results[i] is None else {owner: results[i]}
            results[i] = _value(self.graph, owner, stored, make or _plain)
        return results

    def nbytes(self, leaf: int) -> int:
        """Bytes that reading a leaf takes; Python values in the manifest take none."""
        index = self._entries.get((leaf,))
        found = [self._entries[owner] for owner in self._inner((leaf,))] if index is None else [index]
        return sum([_nbytes(self.manifest.entries[index]) for index in found])

    def _inner(self, owner: Owner) -> list[Owner]:
        """Paths of the stored values inside an iterator's state."""
        return [found for found in _owners(self.graph, owner) if found in self._entries]

    def digest(self, leaf: int) -> Any:
        """Equal for two leaves whose stored arrays are equal and laid out alike."""
        index = self._entries.get((leaf,))
        if index is None:
            return leaf
        entry = self.manifest.entries[index]
        return entry.dtype, entry.shape, entry.chunk_shape, self.manifest.digests[index]

    def close(self) -> None:
        """Closes the data files."""
        self._values.close()

    def _table(self, name: str, expected: bytes) -> ChunkTable:
        path = os.path.join(self.path, name)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{path} is missing", files=[name]) from error
        if digest(data) != expected:
            raise CorruptCheckpointError(
                f"{path} is damaged: its digest does not fit its bytes", files=[name]
            )
        return ChunkTable.decode(data, path)

    def _request(self, index: int, into: Any) -> Request:
        entry = self.manifest.entries[index]
        return Request(index, entry.chunk_shape, entry.shape, numpy_dtype(entry.dtype), into)


def _identity(path: str) -> tuple[int, int, int] | None:
    """Equal as long as the same checkpoint lies at a path."""
    try:
        status = os.stat(os.path.join(path, manifests.NAME))
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def read_manifest(path: str) -> bytes:
    """The bytes of a checkpoint's manifest.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CorruptCheckpointError: a checkpoint of ours has lost it.
        UnsupportedFormatError: what is there is no checkpoint of ours.
    """
    try:
        with open(os.path.join(path, manifests.NAME), "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.lexists(path):
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}") from error
        try:
            names_there = os.listdir(path) if os.path.isdir(path) else []
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}") from error
        if is_ours(names_there, _optional(os.path.join(path, CHECKPOINT_METADATA))):
            message = f"{path} has lost its {manifests.NAME}, which says what its files hold"
            raise CorruptCheckpointError(message, files=[manifests.NAME]) from error
        raise UnsupportedFormatError(f"{path} is no checkpoint that this release reads") from error


def _optional(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * numpy_dtype(entry.dtype).itemsize


def _owners(graph: ObjectGraph, owner: Owner) -> list[Owner]:
    """The leaf itself, and all leaves of an iterator's state."""
    spec = graph.leaves[owner[-1]].spec
    if not isinstance(spec, IteratorSpec) or spec.state is None:
        return [owner]
    found: list[Owner] = []
    for index in range(len(spec.state.leaves)):
        found += _owners(spec.state, (*owner, index))
    return found


def _value(graph: ObjectGraph, owner: Owner, read: dict[Owner, Any], make: Make) -> Any:
    spec = graph.leaves[owner[-1]].spec
    if isinstance(spec, IteratorSpec) and spec.state is not None:
        from jaxckpt.graph.rebuild import rebuild  # needs jax, which a reader otherwise does without

        state = spec.state
        return rebuild(state, [_as_saved(state, (*owner, i), read, make) for i in range(len(state.leaves))])
    if isinstance(spec, ValueSpec):
        return spec.value if owner not in read else bytes_value(spec.type, read[owner].tobytes())
    return read[owner]


def _as_saved(state: ObjectGraph, owner: Owner, read: dict[Owner, Any], make: Make) -> Any:
    """A value inside an iterator's state."""
    value = _value(state, owner, read, make)
    spec = state.leaves[owner[-1]].spec
    return make(value, spec) if isinstance(spec, ArraySpec) else value


def _plain(value: Any, spec: ArraySpec) -> Any:
    """Numpy for every array, a scalar for a numpy scalar."""
    return value[()] if spec.array_type == "scalar" else value
