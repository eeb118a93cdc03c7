"""What all saves of one structure have in common: storage keys, chunks, documents. Pure, and remembered."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxckpt.graph.model import Frozen, IteratorSpec, ObjectGraph, ValueSpec
from jaxckpt.storage.chunks import NO_LEAF, Keys, chunk_names
from jaxckpt.storage.format import orbax_files
from jaxckpt.storage.format.dtypes import numpy_dtype
from jaxckpt.storage.format.spelling import Place, fits_orbax, places
from jaxckpt.storage.format.zarr import zarray
from jaxckpt.storage.layout import Entry, is_long, layout, prefix, value_bytes
from jaxckpt.storage.saved_text import entry_texts, graphs_text

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from jaxckpt.graph.flatten import Flat

#: Chunks of this many bytes and more are handed over by reference: below it the fixed cost of opening
#: an array (0.1 ms) is more than that of a copy.
REFERENCE_BYTES = 1 << 20
_MAX_RANK = 32  # tensorstore's
#: Structures whose plans are remembered; one of 5000 leaves takes 5 MB.
_MAX_PLANS = 4


class Item(NamedTuple):
    """An array as the database is to have it.

    Attributes:
        shape, chunk_shape: of its values and of each chunk, which divides it.
        names: key of each chunk in the database, in C order.
        document: key and text of its ``.zarray``; None for bytes that zarr has no name for.
        by_reference: whether its chunks are written from the memory that they lie in.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    names: tuple[str, ...]
    document: tuple[str, bytes] | None
    by_reference: bool


class Plan(Frozen, frozen=True, kw_only=True, eq=False):
    """How a structure is written.

    Attributes:
        entries: what lies in the database.
        items: the same as the database is to have it.
        places: what Orbax sees of the tree.
        aliases: pairs of an entry's storage key and a further one of the same values.
        keys: every key that the database will have.
        files: Orbax's files that depend on the structure alone, by name.
        entry_texts: see `saved_text.entry_texts`.
        graphs_text: see `saved_text.graphs_text`; None where it says values that differ from save to save.
    """

    entries: tuple[Entry, ...]
    items: tuple[Item, ...]
    places: tuple[Place, ...]
    aliases: tuple[tuple[str, str], ...]
    keys: Keys
    files: Mapping[str, bytes]
    entry_texts: tuple[bytes, ...]
    graphs_text: bytes | None


# The graph is kept with its plan, so that its identity is nobody else's meanwhile.
_plans: OrderedDict[Hashable, tuple[ObjectGraph, Plan]] = OrderedDict()


def plan(flat: Flat) -> Plan:
    """The plan of a tree that is saved; the same again for what differs in values only."""
    key = _signature(flat)
    known = _plans.get(key)
    if known is not None:
        with contextlib.suppress(KeyError):  # no lock: another thread may have dropped it
            _plans.move_to_end(key)
        return known[1]
    made = make_plan(flat.graph, with_values=flat.graph is not flat.skeleton)
    _plans[key] = flat.skeleton, made
    with contextlib.suppress(KeyError):
        while len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)
    return made


def _signature(flat: Flat) -> Hashable:
    """Equal for trees of one plan: of the values only what decides where they lie."""
    if flat.graph is flat.skeleton:
        return id(flat.skeleton)
    forms: list[Hashable] = []
    for index, leaf in enumerate(flat.graph.leaves):
        spec = leaf.spec
        if isinstance(spec, ValueSpec):
            forms.append((fits_orbax(spec), len(value_bytes(spec)) if is_long(spec) else -1))
        elif isinstance(spec, IteratorSpec) and index in flat.states:
            forms.append(_signature(flat.states[index]))
    return id(flat.skeleton), tuple(forms)


def make_plan(graph: ObjectGraph, *, with_values: bool) -> Plan:
    """The plan of a graph that holds its values.

    Args:
        graph: what is saved, with its iterators' states.
        with_values: whether it says values that another tree of the same plan has otherwise.
    """
    visible = places(graph)
    entries = layout(graph, visible)
    items = tuple(
        prepare(entry.key, entry.shape, numpy_dtype(entry.dtype), entry.chunk_shape, raw=entry.raw)
        for entry in entries
    )
    aliases = tuple((entry.key, alias) for entry in entries for alias in entry.alias_keys)
    others = [
        place.key
        for place in visible
        if place.leaf >= 0 and place.type == "scalar" and isinstance(graph.leaves[place.leaf].spec, ValueSpec)
    ]
    return Plan(
        entries=entries,
        items=items,
        places=visible,
        aliases=aliases,
        keys=_keys(items, entries, others),
        files=orbax_files.files(graph, entries, visible),
        entry_texts=entry_texts(graph, entries),
        graphs_text=None if with_values else graphs_text(graph, entries),
    )


def _keys(items: Sequence[Item], entries: Sequence[Entry], scalars: Sequence[str]) -> Keys:
    """Every key of the database, sorted as the database has them, and what it stands for."""
    rows: list[tuple[bytes, int, int]] = []
    for index, (item, entry) in enumerate(zip(items, entries, strict=True)):
        rows += [(name.encode(), index, number) for number, name in enumerate(item.names)]
        others = [] if item.document is None else [item.document[0]]
        start = len(prefix(entry.key))
        others += [prefix(key) + name[start:] for key in entry.alias_keys for name in (*item.names, *others)]
        rows += [(name.encode(), NO_LEAF, 0) for name in others]
    rows += [(f"{prefix(key)}{name}".encode(), NO_LEAF, 0) for key in scalars for name in ("0", ".zarray")]
    if not rows:
        rows.append((EMPTY.encode(), NO_LEAF, 0))
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    leaf = np.array([row[1] for row in rows], np.uint32)
    number = np.cumsum(leaf != NO_LEAF) - 1  # of each chunk among the chunks, as they are written
    return Keys(
        names=[rows[i][0] for i in order],
        leaf=leaf[order],
        chunk=np.array([rows[i][2] for i in order], np.uint32),
        number=np.where(leaf != NO_LEAF, number, -1)[order],
    )


#: The one key of a database that would have none: without a key there is no file, and Orbax finds nothing.
EMPTY = ".jaxckpt"


def prepare(
    key: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_shape: tuple[int, ...], *, raw: bool = False
) -> Item:
    """An array as the database is to have it.

    Args:
        key: storage key, without a slash at its end; empty for a tree that is one array.
        shape: of the values.
        dtype: of the values; little-endian.
        chunk_shape: shape of a chunk.
        raw: whether to leave the ``.zarray`` document out.

    Raises:
        ValueError: the chunks do not divide the array.
    """
    start = prefix(key)
    names, document, by_reference = _form(shape, dtype, chunk_shape)
    return Item(
        shape=shape,
        chunk_shape=chunk_shape,
        names=tuple([start + name for name in names]),
        document=None if raw else (f"{start}.zarray", document),
        by_reference=by_reference,
    )


@lru_cache(maxsize=4096)
def _form(
    shape: tuple[int, ...], dtype: np.dtype[Any], chunk_shape: tuple[int, ...]
) -> tuple[tuple[str, ...], bytes, bool]:
    """Names of the chunks, the document, and whether the chunks are written by reference."""
    if any(size % part for size, part in zip(shape, chunk_shape, strict=True) if part):
        raise ValueError(f"chunks of {chunk_shape} do not divide the shape {shape}")
    nbytes = math.prod(chunk_shape) * dtype.itemsize
    large = nbytes >= REFERENCE_BYTES and math.prod(shape) > 0 and 0 < len(shape) <= _MAX_RANK
    return tuple(chunk_names(shape, chunk_shape)), zarray(shape, chunk_shape, dtype.name), large
