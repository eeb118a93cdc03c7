"""The entries of a manifest, read back and checked against its graph. Pure."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from jaxckpt.graph.model import ArraySpec, IteratorSpec, LeafSpec, ObjectGraph, ValueSpec
from jaxckpt.storage.layout import Entry, spec_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxckpt.storage.format.documents import EntryDoc

Owner = tuple[int, ...]
#: Dtype and shape of what is stored.
Form = tuple[str, tuple[int, ...]]
Problems = list[str]

_HEX = re.compile(r"[0-9a-f]*")
_HEX_DIGITS = 32
_DTYPE = re.compile(r"[A-Za-z0-9_<>|=\[\]]{1,60}")


def read_digests(documents: Sequence[EntryDoc]) -> tuple[bytes, ...] | None:
    """One for each entry; None if one is not 32 hexadecimal digits."""
    texts = [document.digest for document in documents]
    joined = "".join(texts)
    if any(len(text) != _HEX_DIGITS for text in texts) or not _HEX.fullmatch(joined):
        return None
    data, size = bytes.fromhex(joined), _HEX_DIGITS // 2
    return tuple([data[at : at + size] for at in range(0, len(data), size)])


def read_entries(documents: Sequence[EntryDoc], graph: ObjectGraph, problems: Problems) -> tuple[Entry, ...]:
    """The entries of a checked graph.

    Args:
        documents: as they stand in the manifest.
        graph: the graph beside them.
        problems: gets one text, with its place in the document, for each thing that is wrong.

    Returns:
        The entries, or nothing if there are problems.
    """
    leaves = graph.leaves
    specs = [
        leaves[owner[0]].spec
        if len(owner := document.owner) == 1 and 0 <= owner[0] < len(leaves)
        else spec_at(graph, owner)
        for document in documents
    ]
    # Of thousands of entries there are a few forms, and specs are shared.
    forms: dict[tuple[int, tuple[int, ...], int | None], Form | None] = {}
    found: list[Entry] = []
    for i, (document, spec) in enumerate(zip(documents, specs, strict=True)):
        kind = (id(spec), document.chunk_shape, document.bytes)
        if kind not in forms:
            forms[kind] = _form(document, spec)
        form = forms[kind]
        if form is None:
            problems.append(f"graph.entries[{i}]: no leaf with that owner and chunk shape can be")
            continue
        found.append(
            Entry(
                owner=document.owner,
                aliases=document.aliases,
                key=document.key,
                alias_keys=document.alias_keys,
                dtype=form[0],
                shape=form[1],
                chunk_shape=document.chunk_shape,
                raw=document.raw,
                visible=document.visible,
            )
        )
    if problems:
        return ()
    _check_owners(found, specs, graph, problems)
    keys = [entry.key for entry in found]
    keys += [key for entry in found if entry.alias_keys for key in entry.alias_keys]
    if len(set(keys)) != len(keys):
        twice = [key for key, number in Counter(keys).items() if number > 1]
        problems.append(f"graph.entries: several have the key {twice[0]!r}")
    return tuple(found)


def _form(document: EntryDoc, spec: LeafSpec | None) -> Form | None:
    """Dtype and shape of what is stored; None if there is no such leaf, or not in such chunks."""
    if isinstance(spec, ArraySpec) and document.bytes is None:
        dtype, shape = spec.dtype, spec.stored_shape
    elif isinstance(spec, ValueSpec) and spec.value is None and 0 <= (document.bytes or 0) < 1 << 62:
        dtype, shape = "uint8", (document.bytes or 0,)
    else:
        return None
    chunk_shape = document.chunk_shape
    fits = len(chunk_shape) == len(shape) and all(
        1 <= part <= max(1, length) for part, length in zip(chunk_shape, shape, strict=True)
    )
    return (dtype, shape) if fits and _DTYPE.fullmatch(dtype) else None


def _check_owners(
    entries: Sequence[Entry],
    specs: Sequence[LeafSpec | None],
    graph: ObjectGraph,
    problems: Problems,
) -> None:
    """That each leaf that lies in the database has one entry, and that aliases are of one kind."""
    owned = {entry.owner for entry in entries}
    count = len(entries)
    for i, aliases in [(i, entry.aliases) for i, entry in enumerate(entries) if entry.aliases]:
        for alias in aliases:
            if spec_at(graph, (alias,)) != specs[i]:
                problems.append(f"graph.entries[{i}].aliases: a leaf that is not there, or another array")
            owned.add((alias,))
        count += len(aliases)
    if len(owned) != count:
        problems.append("graph.entries: several are of one leaf")
    problems += [f"graph.entries: none for {key!r}" for path, key in _stored(graph) if path not in owned]


def _stored(graph: ObjectGraph) -> Iterator[tuple[Owner, str]]:
    """Path and key of every leaf whose value lies in the database."""
    waiting: list[tuple[Owner, ObjectGraph]] = [((), graph)]
    for path, inner in waiting:
        for index, leaf in enumerate(inner.leaves):
            spec = leaf.spec
            if isinstance(spec, ArraySpec) or (isinstance(spec, ValueSpec) and spec.value is None):
                yield (*path, index), leaf.key
            elif isinstance(spec, IteratorSpec) and spec.state is not None:
                waiting.append(((*path, index), spec.state))  # the list is the queue
