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

import copy
import re
from typing import TYPE_CHECKING, Any

import msgspec

from jaxckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from jaxckpt.graph.collector import paused
from jaxckpt.graph.model import Frozen, ObjectGraph
from jaxckpt.storage.entries import read_digests, read_entries
from jaxckpt.storage.format.documents import FilesDoc, SavedDoc
from jaxckpt.storage.format.graph_decode import Problems, from_documents
from jaxckpt.storage.format.json_values import freeze_json, thaw_json
from jaxckpt.storage.format.paths import is_safe_name
from jaxckpt.storage.format.seal import NAME as NAME
from jaxckpt.storage.format.seal import VERSION as VERSION
from jaxckpt.storage.format.seal import check_seal
from jaxckpt.storage.format.seal import seal as seal
from jaxckpt.storage.layout import Entry
from jaxckpt.storage.recall import Known, recall, remember, take_apart
from jaxckpt.storage.saved_text import entry_texts, graphs_text, saved_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEX = re.compile(r"[0-9a-f]{32}")


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
_FILES_DECODER = msgspec.json.Decoder(FilesDoc)


def encode(manifest: Manifest) -> bytes:
    """The manifest as bytes.

    Raises:
        TypeError: the metadata, or the metrics, are no JSON value; names the path.
    """
    return seal(encode_saved(manifest), encode_files(manifest.files))


def encode_saved(manifest: Manifest) -> bytes:
    """The deterministic part: graph, metadata, entries and digests.

    Raises:
        TypeError: the metadata are no JSON value; names the path.
    """
    graphs = graphs_text(manifest.graph, manifest.entries)
    texts = entry_texts(manifest.graph, manifest.entries)
    return saved_text(graphs, texts, manifest.digests, manifest.metadata)


def encode_files(files: Files) -> bytes:
    """What differs from save to save.

    Raises:
        TypeError: the metrics are no JSON value; names the path.
    """
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
    check_seal(data, source)
    with paused():
        text = take_apart(data)
        files = None if text is None else _files_alone(text.files)
        known = None if text is None or files is None else recall(text)
        if text is not None and files is not None and known is not None:
            return Manifest(
                graph=known.graph,
                metadata=copy.deepcopy(known.metadata),
                entries=known.entries,
                digests=text.digests,
                files=files,
            )
        manifest = _decode(_document(data, source), source)
        if text is not None and files == manifest.files:
            known = Known(manifest.graph, copy.deepcopy(manifest.metadata), manifest.entries)
            remember(text, known, manifest.digests)
        return manifest


def _files_alone(text: bytes) -> Files | None:
    """The part that differs from save to save; None if anything is wrong with it."""
    problems: Problems = []
    try:
        files = _files(_FILES_DECODER.decode(text), problems)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None if problems else files


def _decode(document: _Document, source: str) -> Manifest:
    problems: Problems = []
    graph = from_documents(document.graph.graphs, problems)
    files = _files(document.files, problems)
    metadata = _thaw(document.graph.metadata, "graph.metadata", problems)
    digests = read_digests(document.graph.entries)
    if digests is None:
        problems.append("graph.entries: a digest is not 32 hexadecimal digits")
    entries: tuple[Entry, ...] = ()
    if graph is not None and not problems:
        entries = read_entries(document.graph.entries, graph, problems)
    if graph is None or digests is None or problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CorruptCheckpointError(f"{source} makes no sense:\n  {shown}{more}", files=[NAME])
    return Manifest(graph=graph, metadata=metadata, entries=entries, digests=digests, files=files)


def _document(data: bytes, source: str) -> _Document:
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
