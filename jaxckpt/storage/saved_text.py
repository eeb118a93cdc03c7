"""The deterministic part of a manifest as text; most of it is the same in all saves of a structure. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from jaxckpt.graph.model import ObjectGraph, ValueSpec
from jaxckpt.storage.format.documents import EntryDoc
from jaxckpt.storage.format.graph_encode import to_documents
from jaxckpt.storage.format.json_values import freeze_json
from jaxckpt.storage.layout import Entry, spec_at

if TYPE_CHECKING:
    from collections.abc import Sequence

# Where a digest goes. JSON spells this character otherwise, so that it stands nowhere else.
_DIGEST = b"\0"


def graphs_text(graph: ObjectGraph, entries: Sequence[Entry]) -> bytes:
    """The graph and those of its iterators' states, with the values that do not lie in the database."""
    stored = {entry.owner for entry in entries}
    return msgspec.json.encode(to_documents(graph, stored.__contains__))


def entry_texts(graph: ObjectGraph, entries: Sequence[Entry]) -> tuple[bytes, ...]:
    """What stands before, between and behind the digests of the entries."""
    documents = [
        EntryDoc(
            owner=entry.owner,
            key=entry.key,
            digest=msgspec.Raw(_DIGEST),  # pyright: ignore[reportArgumentType]  # split there in a moment
            chunk_shape=entry.chunk_shape,
            aliases=entry.aliases,
            alias_keys=entry.alias_keys,
            bytes=entry.shape[0] if isinstance(spec_at(graph, entry.owner), ValueSpec) else None,
            raw=entry.raw,
            visible=entry.visible,
        )
        for entry in entries
    ]
    return tuple(msgspec.json.encode(documents).split(_DIGEST))


def saved_text(graphs: bytes, entries: Sequence[bytes], digests: Sequence[bytes], metadata: Any) -> bytes:
    """A `documents.SavedDoc`.

    Args:
        graphs: `graphs_text`.
        entries: `entry_texts`.
        digests: one for each entry.
        metadata: the caller's JSON value.

    Raises:
        TypeError: the metadata are no JSON value; names the path.
    """
    parts: list[bytes] = [b'{"graphs":', graphs, b',"entries":', entries[0]]
    for found, text in zip(digests, entries[1:], strict=True):
        parts += (b'"', found.hex().encode(), b'"', text)
    frozen = freeze_json(metadata)
    if frozen is not None:
        parts += (b',"metadata":', msgspec.json.encode(frozen))
    return b"".join([*parts, b"}"])
