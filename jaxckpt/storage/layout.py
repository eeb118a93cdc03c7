"""Which entries of the database a graph has, and what is written beside them for Orbax. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxckpt.graph.model import ArraySpec, Frozen, IteratorSpec, ObjectGraph, ValueSpec, join
from jaxckpt.storage.chunks import grid
from jaxckpt.storage.format.dtypes import numpy_dtype
from jaxckpt.storage.format.spelling import Place, places

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Strings and bytes of more bytes than this lie in the database instead of in the manifest.
INLINE_BYTES = 64 << 10


class Entry(Frozen, frozen=True, kw_only=True):
    """An array of the database.

    Attributes:
        owner: index of the leaf whose value it is; for something in an iterator's state the iterator's leaf,
            then the leaf within its state.
        aliases: further leaves of the same node.
        key: storage key: Orbax's spelling of the first leaf that Orbax sees, or ``.jaxckpt/<n>``.
        alias_keys: storage keys of the further leaves that Orbax sees, so that each opens.
        dtype: name of the stored values' dtype; "uint8" for strings and bytes.
        shape: of what is stored: of keys with their bits, of strings and bytes one axis.
        chunk_shape: its grid.
        raw: bytes only, without a ``.zarray`` document.
        visible: whether Orbax sees it.
    """

    owner: tuple[int, ...]
    aliases: tuple[int, ...] = ()
    key: str
    alias_keys: tuple[str, ...] = ()
    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    raw: bool
    visible: bool


def layout(graph: ObjectGraph, visible: Sequence[Place] | None = None) -> tuple[Entry, ...]:
    """The entries of a graph that holds its values: one for each array node, in the order of the leaves.

    A pure function of the graph: the same in every process and on every day.

    Args:
        graph: what is saved, with its iterators' states.
        visible: `spelling.places` of it, where that is known.
    """
    shown = {place.leaf: place.key for place in (places(graph) if visible is None else visible)}
    members: dict[int, list[int]] = {}
    for index, leaf in enumerate(graph.leaves):
        if isinstance(leaf.spec, ArraySpec):
            members.setdefault(leaf.node, []).append(index)
    entries: list[Entry] = []
    hidden = 0
    for owner, spec in _stored(graph, ()):
        leaves: list[int] = []
        if len(owner) == 1 and isinstance(spec, ArraySpec):
            leaves = members[graph.leaves[owner[0]].node]
            if owner[0] != leaves[0]:
                continue
        keys = [shown[leaf] for leaf in leaves if leaf in shown]
        if not keys:
            hidden_key, hidden = f".jaxckpt/{hidden}", hidden + 1
            entries.append(_entry(owner, tuple(leaves[1:]), [hidden_key], spec, visible=False))
        else:
            entries.append(_entry(owner, tuple(leaves[1:]), keys, spec, visible=True))
    return tuple(entries)


def _entry(
    owner: tuple[int, ...],
    aliases: tuple[int, ...],
    keys: Sequence[str],
    spec: ArraySpec | ValueSpec,
    *,
    visible: bool,
) -> Entry:
    shard = None
    if isinstance(spec, ArraySpec):
        dtype, shape, itemsize = spec.dtype, spec.stored_shape, numpy_dtype(spec.dtype).itemsize
        if spec.sharding is not None and spec.sharding.shard_shape:
            shard = spec.sharding.shard_shape + spec.key_shape
    else:
        dtype, shape, itemsize = "uint8", (len(value_bytes(spec)),), 1
    return Entry(
        owner=owner,
        aliases=aliases,
        key=keys[0],
        alias_keys=tuple(keys[1:]),
        dtype=dtype,
        shape=shape,
        chunk_shape=grid(shape, itemsize, shard),
        raw=not visible,
        visible=visible,
    )


def _stored(
    graph: ObjectGraph, path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], ArraySpec | ValueSpec]]:
    """What goes into the database: arrays, long strings and bytes, and those of the iterators' states."""
    for index, leaf in enumerate(graph.leaves):
        spec = leaf.spec
        if isinstance(spec, ArraySpec) or (isinstance(spec, ValueSpec) and is_long(spec)):
            yield (*path, index), spec
        elif isinstance(spec, IteratorSpec) and spec.state is not None:
            yield from _stored(spec.state, (*path, index))


def is_long(spec: ValueSpec) -> bool:
    """Whether a Python value lies in the database."""
    if isinstance(spec.value, bytes):
        return len(spec.value) > INLINE_BYTES
    if not isinstance(spec.value, str) or len(spec.value) * 4 <= INLINE_BYTES:
        return False
    return len(value_bytes(spec)) > INLINE_BYTES


def value_bytes(spec: ValueSpec) -> bytes:
    """A string or bytes as they lie in the database (UTF-8, in which lone surrogates may stand)."""
    if isinstance(spec.value, bytes):
        return spec.value
    if isinstance(spec.value, str):
        return spec.value.encode("utf-8", "surrogatepass")
    raise TypeError(f"{spec} does not lie in the database")


def bytes_value(type_: str, data: bytes) -> str | bytes:
    """The inverse of `value_bytes`, for a value of type "str" or "bytes"."""
    return data.decode("utf-8", "surrogatepass") if type_ == "str" else data


def spec_at(graph: ObjectGraph, owner: Sequence[int]) -> ArraySpec | ValueSpec | None:
    """The spec of an entry's leaf, or None if there is no such leaf, or one without a stored value."""
    for depth, index in enumerate(owner):
        if not 0 <= index < len(graph.leaves):
            return None
        spec = graph.leaves[index].spec
        if depth == len(owner) - 1:
            return spec if isinstance(spec, ArraySpec | ValueSpec) else None
        if not isinstance(spec, IteratorSpec) or spec.state is None:
            return None
        graph = spec.state
    return None


def names(graph: ObjectGraph, entry: Entry) -> tuple[str, ...]:
    """The keys of all leaves that an entry holds, for messages."""
    found = [graph.leaves[index].key for index in (entry.owner[0], *entry.aliases)]
    state = graph.leaves[entry.owner[0]].spec
    for index in entry.owner[1:]:
        if not isinstance(state, IteratorSpec) or state.state is None:
            break
        leaf = state.state.leaves[index]
        found[0], state = join(found[0], leaf.key), leaf.spec
    return tuple(found)


def prefix(key: str) -> str:
    """What stands before the last part of an entry's database keys; nothing for a tree of one array."""
    return f"{key}/" if key else ""


class OrbaxValues(Frozen, frozen=True, kw_only=True, eq=False):
    """Python values in the form in which Orbax reads them; the manifest is the authority for them.

    Attributes:
        arrays: storage key and 0-d array of each number.
        strings: storage key and text of each string, for ``_strings.json``.
    """

    arrays: tuple[tuple[str, np.ndarray[Any, np.dtype[Any]]], ...]
    strings: tuple[tuple[str, str], ...]


def orbax_values(graph: ObjectGraph, visible: Sequence[Place]) -> OrbaxValues:
    """The Python values that Orbax sees."""
    arrays: list[tuple[str, np.ndarray[Any, np.dtype[Any]]]] = []
    strings: list[tuple[str, str]] = []
    for place in visible:
        spec = graph.leaves[place.leaf].spec if place.leaf >= 0 else None
        if not isinstance(spec, ValueSpec):
            continue
        if isinstance(spec.value, str):
            strings.append((place.key, spec.value))
        else:
            arrays.append((place.key, np.asarray(spec.value)))
    return OrbaxValues(arrays=tuple(arrays), strings=tuple(strings))
