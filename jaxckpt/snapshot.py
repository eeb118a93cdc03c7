"""Taking the values of a tree so that nothing can change them any more: what a training step waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from msgspec import Struct

from jaxckpt.errors import SaveError
from jaxckpt.graph.flatten import Flat
from jaxckpt.graph.model import ObjectGraph, ValueSpec
from jaxckpt.storage import hold
from jaxckpt.storage.layout import Entry, spec_at, value_bytes
from jaxckpt.storage.plan import plan
from jaxckpt.storage.stage import Contents


class Snapshot(Struct, frozen=True, kw_only=True):
    """The values of a tree, which nothing can change any more.

    Attributes:
        flat: the tree, without its values.
        held: its arrays and those of its iterators' states, in the order of `_flats`.
    """

    flat: Flat
    held: hold.Held


def take_snapshot(flat: Flat, how: str = "host", *, borrow: bool = False) -> Snapshot:
    """Holds the value of every array node: this is what a training step waits for.

    Args:
        flat: the tree.
        how: as of `save_async`'s ``snapshot``.
        borrow: whether to copy nothing, for values that stay as they are until they are written.
    """
    values: list[Any] = []
    shows: list[Callable[[Any], Any] | None] = []
    for _, inner in _flats(flat):
        values += [inner.values[index] for index in inner.arrays]
        shows += inner.shows
    if borrow:
        held = hold.borrow_all(values, shows)
    elif how == "device":
        held = hold.hold_on_devices(values, shows)
    else:
        held = hold.hold_all(values, shows, copy=how == "copy")
    return Snapshot(flat=_without_values(flat), held=held)


def _without_values(flat: Flat) -> Flat:
    """What was copied is not kept alive twice."""
    states = {index: _without_values(inner) for index, inner in flat.states.items()}
    return replace(flat, values=(), states=states)


def _flats(flat: Flat, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Flat]]:
    """A tree and the states of its iterators, each with where it stands."""
    yield path, flat
    for index, inner in flat.states.items():
        yield from _flats(inner, (*path, index))


def contents_of(snapshot: Snapshot) -> Contents:
    """What to write of a snapshot."""
    made = plan(snapshot.flat)
    owners: list[tuple[int, ...]] = [
        (*path, index) for path, inner in _flats(snapshot.flat) for index in inner.arrays
    ]
    held = dict(zip(owners, snapshot.held.buffers, strict=True))
    graph = snapshot.flat.graph
    buffers = tuple(
        buffer if (buffer := held.get(entry.owner)) is not None else _value_buffer(graph, entry)
        for entry in made.entries
    )
    return Contents(graph=graph, plan=made, buffers=buffers)


def _value_buffer(graph: ObjectGraph, entry: Entry) -> memoryview:
    spec = spec_at(graph, entry.owner)
    if not isinstance(spec, ValueSpec):
        raise AssertionError(f"no value of {entry.key!r} was held")
    return memoryview(value_bytes(spec))


def sizes(flat: Flat) -> tuple[int, int]:
    """Bytes of all arrays of a tree, and of those of them that have to be copied to be held."""
    parts = [inner for _, inner in _flats(flat)]
    return sum(part.nbytes for part in parts), sum(part.nbytes_apart for part in parts)


class Borrowing:
    """Values that a save reads where they lie, because copies of them would not fit in the memory limit."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._interrupted = False

    def wait(self) -> None:
        """Returns when the values have been written: until then the caller may not go on."""
        try:
            self._ended.wait()
        except BaseException:
            self._interrupted = True
            raise

    def end(self) -> None:
        """Lets the caller go on, for the values have been written.

        Raises:
            SaveError: the caller went on before, and may have changed them.
        """
        self.release()
        if self._interrupted:
            raise SaveError("the call of save was interrupted while its values were being written")

    def release(self) -> None:
        """Lets the caller go on, whatever has come of the save."""
        self._ended.set()
