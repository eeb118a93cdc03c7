"""Writing one checkpoint into its staging directory: values, chunk table, Orbax's files, manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from jaxckpt import __version__
from jaxckpt.graph.model import ObjectGraph
from jaxckpt.storage import directory, handler, kv
from jaxckpt.storage import manifest as manifests
from jaxckpt.storage.chunks import build_table, chunk_slices, digest, leaf_digest
from jaxckpt.storage.format import orbax_files
from jaxckpt.storage.format.spelling import Place
from jaxckpt.storage.layout import Entry, OrbaxValues, chunk_keys, prefix
from jaxckpt.storage.manifest import Files, Manifest

TABLE = "chunks.process_0"
#: Where the database keeps its values.
VALUES = "d/"
Array = np.ndarray[Any, np.dtype[Any]]


class Contents(Struct, frozen=True, kw_only=True, eq=False):
    """What a checkpoint is to hold.

    Attributes:
        graph: the tree.
        entries: what goes into the database.
        hosts: the values of each, C-contiguous, which nothing changes any more.
        places: what Orbax sees of the tree.
        orbax: Python values in the form in which Orbax reads them.
    """

    graph: ObjectGraph
    entries: tuple[Entry, ...]
    hosts: tuple[Array, ...]
    places: tuple[Place, ...]
    orbax: OrbaxValues

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(host.nbytes for host in self.hosts)


class Facts(Struct, frozen=True, kw_only=True):
    """What a manifest says of one save and no other.

    Attributes:
        metadata: the caller's JSON value.
        started: seconds since 1970.
        step, save_counter, writer, metrics: see `manifest.Files`.
        sequence: called when everything else is written.
    """

    metadata: Any
    started: float
    step: int | None
    save_counter: int | None
    writer: str
    metrics: Mapping[str, float] | None
    sequence: Callable[[], int]


def write_stage(
    staging: directory.Staging,
    contents: Contents,
    facts: Facts,
    *,
    memory_limit: int,
    lap: Callable[[str], None],
) -> int:
    """Writes everything; nothing is durable or visible yet.

    Args:
        staging: where to.
        contents: what.
        facts: what else the manifest says.
        memory_limit: bytes of host memory for copies.
        lap: called with the name of each stage when it ends.

    Returns:
        Bytes of all files.

    Raises:
        SaveError: the files could not be written.
    """
    digests, leaves = chunk_digests(contents)
    lap("digest")
    located = _values(staging.path, contents, memory_limit)
    lap("write")
    table = build_table(
        located, chunk_keys(contents.entries), {**_documents(contents, located), **digests}
    ).encode()
    files = orbax_files.files(contents.graph, contents.entries, contents.places, contents.orbax)
    files[TABLE] = table
    files[orbax_files.COMMIT_SUCCESS] = orbax_files.COMMIT_SUCCESS_CONTENT
    with directory.saving(staging.target):
        for name, data in files.items():
            _write(staging.path, name, data)
        others = _others(staging.path)
        manifest = Manifest(
            graph=contents.graph,
            metadata=facts.metadata,
            entries=contents.entries,
            digests=leaves,
            files=Files(
                sequence=facts.sequence(),
                started=facts.started,
                committed=time.time(),
                step=facts.step,
                save_counter=facts.save_counter,
                writer=facts.writer,
                name=os.path.basename(staging.target),
                version=__version__,
                metrics=facts.metrics,
                tables={TABLE: digest(table)},
                others=others,
                nbytes=contents.nbytes,
            ),
        )
        data = manifests.encode(manifest)
        _write(staging.path, manifests.NAME, data)
        _write(staging.path, orbax_files.CHECKPOINT_METADATA, orbax_files.checkpoint_metadata(data))
    lap("manifest")
    return sum(size for _, size in _sizes(staging.path))


def chunk_digests(contents: Contents) -> tuple[dict[str, bytes], tuple[bytes, ...]]:
    """The digest of each chunk by its key in the database, and of each entry."""
    chunks: dict[str, bytes] = {}
    leaves: list[bytes] = []
    keys = iter(chunk_keys(contents.entries))
    for entry, host in zip(contents.entries, contents.hosts, strict=True):
        own: list[bytes] = []
        for place in chunk_slices(entry.shape, entry.chunk_shape):
            found = digest(_bytes(host[(*place, ...)]))
            chunks[next(keys)] = found
            own.append(found)
        leaves.append(leaf_digest(own))
    return chunks, tuple(leaves)


def _bytes(chunk: Array) -> Array:
    return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)


def _values(path: str, contents: Contents, memory_limit: int) -> list[kv.Located]:
    """Writes the database."""
    arrays = [
        kv.ArrayWrite(key=entry.key, host=host, chunk_shape=entry.chunk_shape, raw=entry.raw)
        for entry, host in zip(contents.entries, contents.hosts, strict=True)
    ]
    arrays += [kv.ArrayWrite(key=key, host=array, chunk_shape=()) for key, array in contents.orbax.arrays]
    aliases = [(entry.key, alias) for entry in contents.entries for alias in entry.alias_keys]
    return handler.write(path, arrays, aliases=aliases, memory_limit=memory_limit)


def _documents(contents: Contents, located: Sequence[kv.Located]) -> dict[str, bytes]:
    """Digests of the ``.zarray`` documents that are too long to lie inside a tree node."""
    long = {value.key for value in located if value.file is not None and value.key.endswith(".zarray")}
    found: dict[str, bytes] = {}
    for entry in contents.entries if long else ():
        key = f"{prefix(entry.key)}.zarray"
        if key in long:
            found[key] = digest(kv.zarray(entry.shape, entry.chunk_shape, entry.dtype))
    return found


def _sizes(path: str) -> Iterator[tuple[str, int]]:
    """Every file below a directory with its size, by its name with slashes."""
    for parent, _, files in os.walk(path):
        for name in files:
            whole = os.path.join(parent, name)
            yield os.path.relpath(whole, path).replace(os.sep, "/"), os.path.getsize(whole)


def _others(path: str) -> dict[str, tuple[int, bytes]]:
    """Size and digest of every file but the values and the chunk table."""
    found: dict[str, tuple[int, bytes]] = {}
    for name, size in sorted(_sizes(path)):
        if not name.startswith(VALUES) and name != TABLE:
            with open(os.path.join(path, name), "rb") as file:
                found[name] = size, digest(file.read())
    return found


def _write(path: str, name: str, data: bytes) -> None:
    """A new file; the commit makes it durable together with all others."""
    whole = os.path.join(path, name)
    os.makedirs(os.path.dirname(whole), exist_ok=True)
    with open(whole, "xb") as file:
        file.write(data)
