"""The manifest, ``graph.json``: what a checkpoint holds, and of which files it consists. Pure.

Three lines of one JSON object::

    {"jaxckpt":1,"digest":"<32 hex digits>",
    "graph":{...},
    "files":{...}}

The digest (xxh3_128) is that of the whole file without those 32 digits; this much is the same in every
version, so that damage is told from a later release. `graph` is deterministic: the same state gives the same
bytes in any process, on any day.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from jaxckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from jaxckpt.graph.model import ArraySpec, Frozen, IteratorSpec, ObjectGraph, ValueSpec
from jaxckpt.storage.format.documents import EntryDoc, FilesDoc, SavedDoc
from jaxckpt.storage.format.graph_decode import Problems, from_documents
from jaxckpt.storage.format.graph_encode import to_documents
from jaxckpt.storage.format.json_values import freeze_json, thaw_json
from jaxckpt.storage.format.paths import is_safe_name
from jaxckpt.storage.format.seal import NAME as NAME
from jaxckpt.storage.format.seal import VERSION as VERSION
from jaxckpt.storage.format.seal import check_seal
from jaxckpt.storage.format.seal import seal as seal
from jaxckpt.storage.layout import Entry, spec_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_HEX = re.compile(r"[0-9a-f]{32}")
_DTYPE = re.compile(r"[A-Za-z0-9_<>|=\[\]]{1,60}")


class Files(Frozen, frozen=True, kw_only=True):
    """What differs from one save of the same state to the next.

    Attributes:
        sequence: number of the commit in its directory; what was committed last is the newest.
        started, committed: seconds since 1970.
        step, save_counter: as the caller numbers.
        writer: who made it: "manager" or "hand".
        name: the checkpoint's name when it was written.
        version: jaxckpt's.
        metrics: name to number.
        tables: digest of each chunk table, by file name.
        others: size in bytes and digest of every other file but those of ``d/``, this one, and those that are
            a function of this one.
        nbytes: bytes of the values.
        nbytes_shared: those of them that earlier checkpoints hold too.
    """

    sequence: int
    started: float
    committed: float
    step: int | None = None
    save_counter: int | None = None
    writer: str = "hand"
    name: str = ""
    version: str = ""
    metrics: Mapping[str, Any] | None = None
    tables: Mapping[str, bytes] = {}
    others: Mapping[str, tuple[int, bytes]] = {}
    nbytes: int = 0
    nbytes_shared: int = 0


class Manifest(Frozen, frozen=True, kw_only=True):
    """A checkpoint's manifest.

    Attributes:
        graph: the tree. Strings and bytes that lie in the database have no value here.
        metadata: the caller's JSON value.
        entries: what lies in the database.
        digests: one for each entry, see `chunks.leaf_digest`.
        files: the rest.
    """

    graph: ObjectGraph
    metadata: Any = None
    entries: tuple[Entry, ...] = ()
    digests: tuple[bytes, ...] = ()
    files: Files


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    jaxckpt: int
    digest: str
    graph: SavedDoc
    files: FilesDoc


_DECODER = msgspec.json.Decoder(_Document)


def encode(manifest: Manifest) -> bytes:
    """The manifest as bytes.

    Raises:
        TypeError: the metadata, or the metrics, are no JSON value; names the path.
    """
    return seal(encode_saved(manifest), _encode_files(manifest.files))


def encode_saved(manifest: Manifest) -> bytes:
    """The deterministic part: graph, metadata, entries and digests.

    Raises:
        TypeError: the metadata are no JSON value; names the path.
    """
    stored = {entry.owner for entry in manifest.entries}
    graphs = to_documents(manifest.graph, stored.__contains__)
    entries = [
        EntryDoc(
            owner=list(entry.owner),
            key=entry.key,
            digest=found.hex(),
            chunk_shape=list(entry.chunk_shape),
            aliases=list(entry.aliases),
            alias_keys=list(entry.alias_keys),
            bytes=entry.shape[0] if isinstance(spec_at(manifest.graph, entry.owner), ValueSpec) else None,
            raw=entry.raw,
            visible=entry.visible,
        )
        for entry, found in zip(manifest.entries, manifest.digests, strict=True)
    ]
    metadata = freeze_json(manifest.metadata)
    return msgspec.json.encode(SavedDoc(graphs=graphs, entries=entries, metadata=metadata))


def _encode_files(files: Files) -> bytes:
    document = FilesDoc(
        sequence=files.sequence,
        started=float(files.started),
        committed=float(files.committed),
        step=files.step,
        save_counter=files.save_counter,
        writer=files.writer,
        name=files.name.encode("utf-8", "backslashreplace").decode(),  # a path may hold any bytes
        version=files.version,
        metrics=freeze_json(None if files.metrics is None else dict(files.metrics), "metrics"),
        tables={name: found.hex() for name, found in files.tables.items()},
        others={name: (size, found.hex()) for name, (size, found) in files.others.items()},
        nbytes=files.nbytes,
        nbytes_shared=files.nbytes_shared,
    )
    return msgspec.json.encode(document)


def decode(data: bytes, source: str = NAME) -> Manifest:
    """Reads a manifest, and believes none of it.

    Args:
        data: the whole file.
        source: its path, for messages.

    Raises:
        CorruptCheckpointError: any byte differs from what was written, or what is written makes no sense;
            names every place.
        UnsupportedFormatError: it was written by a later release.
    """
    collecting = gc.isenabled()
    gc.disable()  # ten thousands of values without a cycle among them: looking for one doubles the time
    try:
        return _decode(_document(data, source), source)
    finally:
        if collecting:
            gc.enable()


def _decode(document: _Document, source: str) -> Manifest:
    problems: Problems = []
    graph = from_documents(document.graph.graphs, problems)
    files = _files(document.files, problems)
    metadata = _thaw(document.graph.metadata, "graph.metadata", problems)
    entries: tuple[Entry, ...] = ()
    if graph is not None and not problems:
        entries = _entries(document.graph.entries, graph, problems)
    if graph is None or problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CorruptCheckpointError(f"{source} makes no sense:\n  {shown}{more}", files=[NAME])
    digests = tuple(bytes.fromhex(entry.digest) for entry in document.graph.entries)
    return Manifest(graph=graph, metadata=metadata, entries=entries, digests=digests, files=files)


def _document(data: bytes, source: str) -> _Document:
    check_seal(data, source)
    try:
        return _DECODER.decode(data)
    except msgspec.ValidationError as error:
        # The digest fits, so nothing is damaged: a field or a word that this release does not know.
        if (
            "unknown field" in str(error)
            or "Invalid enum value" in str(error)
            or "Invalid value" in str(error)
        ):
            message = f"{source} says what this release does not know ({error}): upgrade jaxckpt"
            raise UnsupportedFormatError(message) from error
        raise CorruptCheckpointError(f"{source} makes no sense: {error}", files=[NAME]) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{source} is no JSON: {error}", files=[NAME]) from error


def _thaw(value: Any, where: str, problems: Problems) -> Any:
    try:
        return thaw_json(value)
    except (ValueError, OverflowError, RecursionError) as error:
        problems.append(f"{where}: {error}")
        return None


def _files(document: FilesDoc, problems: Problems) -> Files:
    hexes = [*document.tables.values(), *(found for _, found in document.others.values())]
    if not all(_HEX.fullmatch(text) for text in hexes):
        problems.append("files: a digest is not 32 hexadecimal digits")
        return Files(sequence=0, started=0.0, committed=0.0)
    unsafe = [name for name in (*document.tables, *document.others) if not is_safe_name(name)]
    problems += [f"files: {name[:60]!r} is no file of a checkpoint" for name in unsafe]
    sizes = [document.nbytes, document.nbytes_shared, *(size for size, _ in document.others.values())]
    if min(sizes) < 0 or document.sequence < 0:
        problems.append("files: a number that is negative")
    metrics = _thaw(document.metrics, "files.metrics", problems)
    if metrics is not None and not isinstance(metrics, dict):
        problems.append("files.metrics: is no object")
        metrics = None
    return Files(
        sequence=document.sequence,
        started=document.started,
        committed=document.committed,
        step=document.step,
        save_counter=document.save_counter,
        writer=document.writer,
        name=document.name,
        version=document.version,
        metrics=metrics,
        tables={name: bytes.fromhex(text) for name, text in document.tables.items()},
        others={name: (size, bytes.fromhex(text)) for name, (size, text) in document.others.items()},
        nbytes=document.nbytes,
        nbytes_shared=document.nbytes_shared,
    )


def _entries(documents: Sequence[EntryDoc], graph: ObjectGraph, problems: Problems) -> tuple[Entry, ...]:
    owners = [tuple(document.owner) for document in documents]
    specs = [spec_at(graph, owner) for owner in owners]
    forms: dict[tuple[int, tuple[int, ...], int | None], tuple[str, tuple[int, ...]] | None] = {}
    found: list[tuple[str, tuple[int, ...]]] = []
    chunk_shapes = [tuple(document.chunk_shape) for document in documents]
    for i, (document, spec, chunk_shape) in enumerate(zip(documents, specs, chunk_shapes, strict=True)):
        form = (id(spec), chunk_shape, document.bytes)
        if form not in forms:
            forms[form] = _form(document, spec, chunk_shape)
        stored = forms[form]
        if stored is None or not _HEX.fullmatch(document.digest):
            problems.append(f"graph.entries[{i}]: no leaf with that owner, chunk shape and digest can be")
        else:
            found.append(stored)
    if problems:
        return ()
    _check_owners(documents, owners, specs, graph, problems)
    keys = [key for document in documents for key in (document.key, *document.alias_keys)]
    if len(set(keys)) != len(keys):
        twice = [key for key, number in Counter(keys).items() if number > 1]
        problems.append(f"graph.entries: several have the key {twice[0]!r}")
    return tuple(
        Entry(
            owner=owner,
            aliases=tuple(document.aliases),
            key=document.key,
            alias_keys=tuple(document.alias_keys),
            dtype=dtype,
            shape=shape,
            chunk_shape=chunk_shape,
            raw=document.raw,
            visible=document.visible,
        )
        for document, owner, (dtype, shape), chunk_shape in zip(
            documents, owners, found, chunk_shapes, strict=True
        )
    )


def _form(
    document: EntryDoc, spec: ArraySpec | ValueSpec | None, chunk_shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape of what is stored; None if there is no such leaf, or not in such chunks."""
    if isinstance(spec, ArraySpec) and document.bytes is None:
        dtype, shape = spec.dtype, spec.stored_shape
    elif isinstance(spec, ValueSpec) and spec.value is None and 0 <= (document.bytes or 0) < 1 << 62:
        dtype, shape = "uint8", (document.bytes or 0,)
    else:
        return None
    fits = len(chunk_shape) == len(shape) and all(
        1 <= part <= max(1, length) for part, length in zip(chunk_shape, shape, strict=True)
    )
    return (dtype, shape) if fits and _DTYPE.fullmatch(dtype) else None


def _check_owners(
    documents: Sequence[EntryDoc],
    owners: Sequence[tuple[int, ...]],
    specs: Sequence[ArraySpec | ValueSpec | None],
    graph: ObjectGraph,
    problems: Problems,
) -> None:
    """That each leaf that lies in the database has one entry, and that aliases are of one kind."""
    owned = set(owners)
    count = len(owners)
    for i, document in enumerate(documents):
        for alias in document.aliases:
            if spec_at(graph, (alias,)) != specs[i]:
                problems.append(f"graph.entries[{i}].aliases: a leaf that is not there, or another array")
            owned.add((alias,))
        count += len(document.aliases)
    if len(owned) != count:
        problems.append("graph.entries: several are of one leaf")
    problems += [f"graph.entries: none for {key!r}" for path, key in _stored(graph) if path not in owned]


def _stored(graph: ObjectGraph) -> Iterator[tuple[tuple[int, ...], str]]:
    """Path and key of every leaf whose value lies in the database."""
    waiting: list[tuple[tuple[int, ...], ObjectGraph]] = [((), graph)]
    for path, inner in waiting:
        for index, leaf in enumerate(inner.leaves):
            spec = leaf.spec
            if isinstance(spec, ArraySpec) or (isinstance(spec, ValueSpec) and spec.value is None):
                yield (*path, index), leaf.key
            elif isinstance(spec, IteratorSpec) and spec.state is not None:
                waiting.append(((*path, index), spec.state))  # the list is the queue
