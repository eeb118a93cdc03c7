"""The database of a checkpoint: arrays and documents in one OCDBT key-value store.

The only importer of tensorstore. Formats: OCDBT as tensorstore documents it
(https://google.github.io/tensorstore/kvstore/ocdbt), and in it each array as zarr v2 without a
compressor (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html): ``<key>/.zarray``, a JSON
document, and ``<key>/<i>.<j>``, the bytes of a chunk in C order.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts
from msgspec import Struct

from jaxckpt.errors import SaveError
from jaxckpt.storage.chunks import INLINE, Located, chunk_counts, chunk_slices, digest
from jaxckpt.storage.format import ocdbt
from jaxckpt.storage.hold import take_in_order
from jaxckpt.storage.memory import give_back
from jaxckpt.storage.plan import EMPTY, Item
from jaxckpt.storage.process import was_forked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxckpt.storage.hold import Borrowed, Buffer

#: Size at which a data file is closed and the next one begun.
DATA_FILE_BYTES = 64 << 20
#: Bytes that a transaction copies at most; more of them are no faster (measured from 16 MiB to 1 GiB).
COPIED_BYTES = 64 << 20
#: Values of at most this many bytes lie inside the tree nodes.
INLINE_BYTES = 256
# Freed memory of fewer bytes is not worth the milliseconds that it takes to return it.
_GIVE_BACK_FROM = 16 << 20
# Seconds between two looks at how far a write is.
_LOOK_EVERY = 0.1


class Written(Struct, frozen=True, kw_only=True):
    """What `write` has written.

    Attributes:
        located: where all values of the database lie.
        digests: of each chunk, in the order of the items and in C order within each.
        others: digest of each other value that may lie in a data file, by its key.
    """

    located: Located
    digests: list[bytes]
    others: dict[bytes, bytes]


def context() -> ts.Context:
    """A tensorstore context for one database, also for `orbax.checkpoint.type_handlers.ParamInfo`."""
    refuse_fork()
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})


def write(
    directory: str,
    items: Sequence[Item],
    buffers: Sequence[Buffer | Borrowed],
    aliases: Sequence[tuple[str, str]] = (),
    *,
    memory_limit: int = 1 << 30,
    sync: bool = False,
    progress: Callable[[], object] | None = None,
) -> Written:
    """Writes a new database into `directory`, which exists, and says where all of it lies.

    Large chunks are written from the memory they lie in, where they are contiguous there, and their digests
    are taken meanwhile; what must be copied is held in transactions of at most half of `memory_limit`, and
    of `COPIED_BYTES`. Starts no thread of Python's, so that it works while the interpreter shuts down.

    Args:
        directory: where to, an absolute path; the files are ``manifest.ocdbt``, values in ``d/``, tree
            nodes in ``m/``.
        items: the arrays.
        buffers: the values of each. Not to be changed before this has returned or raised. Those that are
            `Borrowed` are brought to the host within the memory limit.
        aliases: pairs of a prefix whose keys are written here, and a prefix under which the same
            values are to be found as well; they take the room of a tree entry.
        memory_limit: bytes.
        sync: whether tensorstore forces the files to the disk as it writes them; else the caller does.
        progress: called now and then.

    Raises:
        SaveError: the files could not be written; other writes may still be under way (`directory.abandon`).
    """
    refuse_fork()
    writer = _Writer(directory, max(1, min(memory_limit // 2, COPIED_BYTES)), sync, progress)
    try:
        writer.open()
        writer.arrays(items, buffers)
        if not writer.started:
            writer.put(EMPTY, b"")
        writer.commit()
        if aliases:
            writer.aliases(aliases)
        located = ocdbt.located(directory)
        _trim(directory, located)
    except SaveError:
        raise
    except Exception as error:  # tensorstore maps each status to another class of Python's
        nbytes = sum(buffer.nbytes for buffer in buffers)
        failure = SaveError(f"cannot write {nbytes} bytes of values into {directory}: {error}")
        failure.errno = _system_error(error)
        raise failure from error
    finally:
        writer.abort()
        if writer.copied_in_all >= _GIVE_BACK_FROM:
            give_back()
    return Written(located=located, digests=writer.digests, others=writer.others)


def _system_error(error: Exception) -> int | None:
    """What the operating system has said, which tensorstore quotes in its message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def _trim(directory: str, located: Located) -> None:
    """Cuts off the zeros by which OCDBT fills large data files up to a whole page."""
    ends = [0] * len(located.files)
    for file, offset, length in zip(located.file, located.offset, located.length, strict=True):
        if file != INLINE and offset + length > ends[file]:
            ends[file] = offset + length
    for name, end in zip(located.files, ends, strict=True):
        path = os.path.join(directory, name)
        if os.path.getsize(path) != end:
            os.truncate(path, end)


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
            "max_inline_value_bytes": INLINE_BYTES,
            "max_decoded_node_bytes": 65536,
            "compression": None,
        },
        "value_data_prefix": "d/",
        "btree_node_data_prefix": "m/",
        "version_tree_node_data_prefix": "m/",
        "target_data_file_size": DATA_FILE_BYTES,
        "cache_pool": "cache_pool#ocdbt",
    }


@lru_cache(maxsize=1024)
def _stand_in(nbytes: int, rank: int) -> tuple[int, ...]:
    """A shape of so many bytes and that rank, without lengths of 1 if the number allows."""
    lengths: list[int] = []
    for _ in range(rank - 1):
        factor = next((prime for prime in (2, 3, 5, 7, 11, 13) if nbytes % prime == 0), 1)
        lengths.append(factor)
        nbytes //= factor
    return (*lengths, nbytes)


class _Writer:
    """One database being written: the open transaction and what it holds."""

    def __init__(
        self, directory: str, budget: int, sync: bool, progress: Callable[[], object] | None
    ) -> None:
        self.directory, self.budget, self.progress = directory, budget, progress
        self.digests: list[bytes] = []
        self.others: dict[bytes, bytes] = {}
        self._sync, self._context = sync, context()
        self._store: Any = None
        self._transaction: Any = None
        self._inside: Any = None
        self._pending: list[Any] = []
        self._undigested: list[tuple[int, Any]] = []
        self._copied = self.copied_in_all = 0
        self.started = False

    def open(self) -> None:
        spec = _spec(self.directory, self._sync)
        self._store = ts.KvStore.open(spec, context=self._context).result()

    def arrays(self, items: Sequence[Item], buffers: Sequence[Buffer | Borrowed]) -> None:
        starts: list[int] = []
        number = 0
        for item in items:
            starts.append(number)
            number += len(item.names)
        self.digests = [b""] * number
        # what is copied comes last, and shares the last transaction
        order = sorted(range(len(items)), key=lambda i: not items[i].by_reference)
        for i, buffer, copied in take_in_order(buffers, order, self.budget):
            if items[i].by_reference:
                self._reference(items[i], np.asarray(buffer), starts[i], copied=copied)
            else:
                self._copy(items[i], buffer, starts[i])
            document = items[i].document
            if document is not None:
                self.put(*document)

    def _copy(self, item: Item, buffer: Buffer, number: int) -> None:
        if len(item.names) == 1:
            # (not an item of an array of strings: that comes without the zeros at its end)
            data = buffer.tobytes()
            self.digests[number] = digest(data)
            self._pending.append(self._room(len(data)).write(item.names[0], data))
            return
        array = np.asarray(buffer)
        for name, slices in zip(item.names, chunk_slices(item.shape, item.chunk_shape), strict=True):
            data = array[slices].tobytes()
            self.digests[number] = digest(data)
            self._pending.append(self._room(len(data)).write(name, data))
            number += 1

    def put(self, key: str, value: bytes) -> None:
        """Writes a value that is no chunk."""
        if len(value) > INLINE_BYTES:
            self.others[key.encode()] = digest(value)
        self._pending.append(self._room(len(value)).write(key, value))

    def commit(self) -> None:
        """Writes what is pending."""
        if self._transaction is None:
            return
        for future in self._pending:
            future.result()
        self._pending = [self._transaction.commit_async()]
        for number, data in self._undigested:
            self.digests[number] = digest(data)
        self._wait(self._pending[0])
        self._forget()

    def _wait(self, future: Any) -> None:
        while self.progress is not None:
            try:
                future.result(timeout=_LOOK_EVERY)
                return
            except TimeoutError:
                self.progress()
        future.result()

    def abort(self) -> None:
        """Throws away what is pending, if anything is; see `directory.abandon` for what still writes."""
        if self._transaction is not None:
            self._transaction.abort()
            for future in self._pending:
                with contextlib.suppress(Exception):  # told already, or the effect of the abort
                    future.result()
            self._forget()

    def aliases(self, aliases: Sequence[tuple[str, str]]) -> None:
        """Copies tree entries, which needs values that are committed, in a transaction of their own."""
        target = self._room(0)
        for existing, new in aliases:
            source = self._store + f"{existing}/"
            self._pending.append(source.experimental_copy_range_to(target + f"{new}/"))
        self.commit()

    def _forget(self) -> None:
        self._transaction, self._inside, self._copied = None, None, 0
        self._pending, self._undigested = [], []

    def _room(self, nbytes: int) -> Any:
        """The store in a transaction that has room for so many bytes more."""
        if self._copied and self._copied + nbytes > self.budget:
            self.commit()
        if self._transaction is None:
            self._transaction = ts.Transaction(atomic=True)
            self._inside = self._store.with_transaction(self._transaction)
            self.started = True
        self._copied += nbytes
        self.copied_in_all += nbytes
        return self._inside

    def _reference(self, item: Item, array: np.ndarray[Any, Any], number: int, *, copied: bool) -> None:
        """Writes large chunks through the zarr driver, which keeps a reference until the commit.

        The driver sees another array with the same names of chunks: of plain bytes, so that this works
        for every dtype, in chunks without lengths of 1, since a chunk with such a one is copied.
        """
        counts = chunk_counts(item.shape, item.chunk_shape)
        places = chunk_slices(item.shape, item.chunk_shape)
        shape = _stand_in(array.nbytes // len(places), array.ndim)
        store: Any = None
        opened: Any = None
        for index, slices in zip(product(*map(range, counts)), places, strict=True):
            part = array[slices]
            shown = part.flags.c_contiguous and 1 not in shape
            inside = self._room(0 if shown and not copied else part.nbytes)
            if opened is None or self._transaction is not opened:
                opened = self._transaction
                start = item.names[0].rindex("/") + 1 if "/" in item.names[0] else 0
                store = self._zarr(inside + item.names[0][:start], counts, shape)
            place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, shape, strict=True))
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            self._undigested.append((number, data))
            number += 1
            self._pending.append(
                store[place].write(data.reshape(shape), can_reference_source_data_indefinitely=True)
            )

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
        return ts.open(spec, kvstore=store, open=True, assume_metadata=True, context=self._context).result()
