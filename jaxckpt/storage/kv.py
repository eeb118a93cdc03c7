"""The database of a checkpoint: arrays and documents in one OCDBT key-value store.

The only importer of tensorstore. Formats: OCDBT as tensorstore documents it
(https://google.github.io/tensorstore/kvstore/ocdbt), and in it each array as zarr v2 without a
compressor (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html): ``<key>/.zarray``, a JSON
document, and ``<key>/<i>.<j>``, the bytes of a chunk in C order.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import tensorstore as ts
from msgspec import Struct

from jaxckpt.errors import CorruptCheckpointError, SaveError
from jaxckpt.storage.chunks import chunk_counts, chunk_names, chunk_slices
from jaxckpt.storage.format.zarr import zarray
from jaxckpt.storage.process import was_forked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Chunks of this many bytes and more are handed over by reference: below it the fixed cost of opening
#: an array (0.1 ms) is more than that of a copy.
REFERENCE_BYTES = 1 << 20
#: Size at which a data file is closed and the next one begun.
DATA_FILE_BYTES = 64 << 20

# Half of this bounds what a transaction may hold where the caller names no bound.
_MEMORY_LIMIT = 1 << 30
_MAX_RANK = 32  # tensorstore's


class ArrayWrite(Struct, frozen=True, kw_only=True):
    """An array on its way to the database.

    Attributes:
        key: storage key, without a slash at its end; empty for a tree that is one array.
        host: the values; little-endian. Not to be changed before `write` has returned.
        chunk_shape: shape of a chunk; divides ``host.shape``.
        raw: whether to leave the ``.zarray`` document out (of what zarr has no name for).
    """

    key: str
    host: np.ndarray[Any, Any]
    chunk_shape: tuple[int, ...]
    raw: bool = False


class Located(NamedTuple):  # not a frozen dataclass: ten thousand of them are made at every save
    """Where a value of the database lies.

    Attributes:
        key: its key.
        file: data file, relative to the database's directory; None for a value inside a tree node.
        offset: of its first byte in that file.
        length: in bytes.
        inline: the value itself where `file` is None, else None.
    """

    key: str
    file: str | None
    offset: int
    length: int
    inline: bytes | None


@lru_cache(maxsize=1024)
def _document(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    return zarray(shape, chunk_shape, dtype.name)


def context() -> ts.Context:
    """A tensorstore context for one database, also for `orbax.checkpoint.type_handlers.ParamInfo`."""
    refuse_fork()
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})


def write(
    directory: str,
    arrays: Sequence[ArrayWrite],
    values: Sequence[tuple[str, bytes]] = (),
    aliases: Sequence[tuple[str, str]] = (),
    *,
    memory_limit: int | None = None,
    sync: bool = False,
) -> list[Located]:
    """Writes a new database into `directory`, which exists, and says where all of it lies, as `locate`.

    Chunks of `REFERENCE_BYTES` and more are written from the memory they lie in, where they are
    contiguous there; what must be copied is held in transactions of at most half of `memory_limit`.
    Starts no thread of Python's, so that it works while the interpreter shuts down.

    Args:
        directory: where to, an absolute path; the files are ``manifest.ocdbt``, values in ``d/``, tree
            nodes in ``m/``.
        arrays: the arrays.
        values: other keys and their values.
        aliases: pairs of a prefix whose keys are written here, and a prefix under which the same
            values are to be found as well; they take the room of a tree entry.
        memory_limit: bytes.
        sync: whether tensorstore forces the files to the disk as it writes them; else the caller does.

    Raises:
        SaveError: the files could not be written.
    """
    refuse_fork()
    writer = _Writer(directory=directory, budget=max(1, (memory_limit or _MEMORY_LIMIT) // 2), sync=sync)
    try:
        writer.arrays(arrays)
        for key, value in values:
            writer.value(key, value)
        if not writer.started:
            writer.value(".jaxckpt", b"")  # without a key there is no file at all, and then Orbax finds none
        writer.commit()
        if aliases:
            writer.aliases(aliases)
    except SaveError:
        raise
    except Exception as error:  # tensorstore maps each status to another class of Python's
        nbytes = sum(array.host.nbytes for array in arrays) + sum(len(value) for _, value in values)
        raise SaveError(f"cannot write {nbytes} bytes of values into {directory}: {error}") from error
    finally:
        writer.abort()
    located = locate(directory)
    _trim(directory, located)
    return located


def locate(directory: str) -> list[Located]:
    """Where each value of the newest version of a database lies, in the order of the keys.

    Raises:
        CorruptCheckpointError: the database cannot be read.
    """
    refuse_fork()
    try:
        base = ts.KvStore.open({"driver": "file", "path": directory.rstrip("/") + "/"}).result()
        manifest: dict[str, Any] = ts.ocdbt.dump(base).result()
        root = manifest["versions"][-1]["root"]
        found = _walk(base, root["location"]) if "location" in root else []
    except Exception as error:
        message = f"the database of {directory} cannot be read: {error}"
        raise CorruptCheckpointError(message, files=("manifest.ocdbt",)) from error
    found.sort()
    return found


def _trim(directory: str, located: Sequence[Located]) -> None:
    """Cuts off the zeros by which OCDBT fills large data files up to a whole page."""
    ends: dict[str, int] = {}
    for value in located:
        if value.file is not None:
            ends[value.file] = max(ends.get(value.file, 0), value.offset + value.length)
    for file, end in ends.items():
        path = os.path.join(directory, file)
        if os.path.getsize(path) != end:
            os.truncate(path, end)


def _walk(base: ts.KvStore, root: str) -> list[Located]:
    found: list[Located] = []
    files: dict[tuple[str, str], str] = {}
    level = [(b"", root)]
    while level:
        # all nodes of a level at once: the reads overlap
        futures = [(prefix, ts.ocdbt.dump(base, node=location)) for prefix, location in level]
        level = []
        for prefix, future in futures:
            node: dict[str, Any] = future.result()
            if node["height"]:
                level += [
                    (prefix + entry["subtree_common_prefix"], entry["location"]) for entry in node["entries"]
                ]
                continue
            for entry in node["entries"]:
                key = (prefix + entry["key"]).decode("utf-8", "surrogateescape")
                inline = entry.get("inline_value")
                if inline is not None:
                    found.append(Located(key, None, 0, len(inline), inline))
                    continue
                # "value:<directory of a merged database, or nothing>:<file>:<offset>:<length>"
                _, parent, name, offset, length = entry["indirect_value"].split(":")
                file = files.get((parent, name))
                if file is None:
                    file = files[parent, name] = unquote(parent) + unquote(name)
                found.append(Located(key, file, int(offset), int(length), None))
    return found


def refuse_fork() -> None:
    """Raises SaveError in a forked child, where the first use of tensorstore would end the process."""
    if was_forked():
        raise SaveError(
            "this process was forked after the storage library had started its threads, which a forked child "
            "does not have: save and restore in the parent, or start the child with "
            "multiprocessing.get_context('spawn')"
        )


def _spec(directory: str, sync: bool) -> dict[str, Any]:
    base = {
        "driver": "file",
        "path": directory.rstrip("/") + "/",
        # no other process writes here, and what is unfinished is thrown away: no need of locks and renames
        "file_io_locking": {"mode": "non_atomic"},
        "file_io_sync": sync,
    }
    return {
        "driver": "ocdbt",
        "base": base,
        "assume_config": True,
        "config": {
            "manifest_kind": "single",
            "max_inline_value_bytes": 256,
            "max_decoded_node_bytes": 65536,
            "compression": None,
        },
        "value_data_prefix": "d/",
        "btree_node_data_prefix": "m/",
        "version_tree_node_data_prefix": "m/",
        "target_data_file_size": DATA_FILE_BYTES,
        "cache_pool": "cache_pool#ocdbt",
    }


def _by_reference(array: ArrayWrite) -> bool:
    nbytes = math.prod(array.chunk_shape) * array.host.dtype.itemsize
    return nbytes >= REFERENCE_BYTES and array.host.size > 0 and 0 < array.host.ndim <= _MAX_RANK


@lru_cache(maxsize=1024)
def _stand_in(nbytes: int, rank: int) -> tuple[int, ...]:
    """A shape of so many bytes and that rank, without lengths of 1 if the number allows."""
    lengths: list[int] = []
    for _ in range(rank - 1):
        factor = next((prime for prime in (2, 3, 5, 7, 11, 13) if nbytes % prime == 0), 1)
        lengths.append(factor)
        nbytes //= factor
    return (*lengths, nbytes)


def _chunks(array: ArrayWrite) -> Iterable[tuple[str, tuple[Any, ...]]]:
    """Name and place of each chunk; of a zero-size array none."""
    shape, chunk_shape = array.host.shape, array.chunk_shape
    if shape == chunk_shape and array.host.size:
        return [(".".join("0" * len(shape)) or "0", (...,))]
    if any(size % part for size, part in zip(shape, chunk_shape, strict=True)):
        raise ValueError(f"chunks of {chunk_shape} do not divide the shape {shape} of {array.key!r}")
    return zip(chunk_names(shape, chunk_shape), chunk_slices(shape, chunk_shape), strict=True)


@dataclass(slots=True, kw_only=True)
class _Writer:
    """One database being written: the open transaction and what it holds."""

    directory: str
    budget: int
    sync: bool
    context: ts.Context = field(default_factory=context)
    store: Any = None
    transaction: Any = None
    inside: Any = None
    pending: list[Any] = field(default_factory=list[Any])
    copied: int = 0
    started: bool = False

    def arrays(self, arrays: Sequence[ArrayWrite]) -> None:
        large = [_by_reference(array) for array in arrays]
        for wanted in (True, False):  # in this order: what is copied shares the last transaction
            for array, is_large in zip(arrays, large, strict=True):
                if is_large is wanted:
                    self._array(array)

    def _array(self, array: ArrayWrite) -> None:
        prefix = f"{array.key}/" if array.key else ""
        if _by_reference(array):
            self._reference(array, prefix)
        else:
            for chunk, slices in _chunks(array):
                # (not an item of an array of strings: that comes without the zeros at its end)
                part = array.host[slices] if slices else array.host
                self._put(prefix + chunk, part.tobytes())
        if not array.raw:
            self._put(f"{prefix}.zarray", _document(array.host.shape, array.chunk_shape, array.host.dtype))

    def value(self, key: str, value: bytes) -> None:
        self._put(key, value)

    def commit(self) -> None:
        """Writes what is pending."""
        if self.transaction is None:
            return
        for future in self.pending:
            future.result()
        transaction: Any = self.transaction
        transaction.commit_async().result()
        self._forget()

    def abort(self) -> None:
        """Throws away what is pending; nothing, after `commit`."""
        if self.transaction is not None:
            self.transaction.abort()
            self._forget()

    def aliases(self, aliases: Iterable[tuple[str, str]]) -> None:
        """Copies tree entries, which needs values that are committed, in a transaction of their own."""
        source, target = self.store, self._open()
        for existing, new in aliases:
            future = (source + f"{existing}/").experimental_copy_range_to(target + f"{new}/")
            self.pending.append(future)
        self.commit()

    def _forget(self) -> None:
        self.transaction, self.inside, self.pending, self.copied = None, None, [], 0

    def _open(self) -> Any:
        if self.store is None:
            self.store = ts.KvStore.open(_spec(self.directory, self.sync), context=self.context).result()
        if self.transaction is None:
            self.transaction = ts.Transaction(atomic=True)
            self.inside = self.store.with_transaction(self.transaction)
        self.started = True
        return self.inside

    def _room(self, nbytes: int) -> Any:
        """The store in a transaction that has room for so many bytes more."""
        if self.copied and self.copied + nbytes > self.budget:
            self.commit()
        self.copied += nbytes
        return self._open()

    def _put(self, key: str, value: bytes) -> None:
        self.pending.append(self._room(len(value)).write(key, value))

    def _reference(self, array: ArrayWrite, prefix: str) -> None:
        """Writes large chunks through the zarr driver, which keeps a reference until the commit.

        The driver sees another array with the same names of chunks: of plain bytes, so that this works
        for every dtype, in chunks without lengths of 1, since a chunk with such a one is copied.
        """
        chunks = list(_chunks(array))
        counts = chunk_counts(array.host.shape, array.chunk_shape)
        shape = _stand_in(array.host.nbytes // len(chunks), array.host.ndim)
        store: Any = None
        opened: Any = None
        for index, (_, slices) in zip(product(*map(range, counts)), chunks, strict=True):
            part = array.host[slices]
            shown = part.flags.c_contiguous and 1 not in shape
            inside = self._room(0 if shown else part.nbytes)
            if opened is None or self.transaction is not opened:
                opened = self.transaction
                store = self._zarr(inside + prefix, counts, shape)
            place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, shape, strict=True))
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).reshape(shape)
            self.pending.append(store[place].write(data, can_reference_source_data_indefinitely=True))

    def _zarr(self, store: Any, counts: tuple[int, ...], chunk_shape: tuple[int, ...]) -> Any:
        spec = {
            "driver": "zarr",
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "chunks": list(chunk_shape),
                "compressor": None,
                "dtype": "|u1",
                "fill_value": None,
                "filters": None,
                "order": "C",
                "shape": [count * length for count, length in zip(counts, chunk_shape, strict=True)],
            },
        }
        return ts.open(spec, kvstore=store, open=True, assume_metadata=True, context=self.context).result()
