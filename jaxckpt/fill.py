"""Filling a target: read right into the results where that can be, else in groups that fit the limit."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np
from msgspec import Struct

from jaxckpt.convert import MisfitError, check_result, convert, describe, same
from jaxckpt.errors import Problem, RestoreError
from jaxckpt.graph.flatten import Flat
from jaxckpt.graph.match import Fill, Match
from jaxckpt.graph.model import ArraySpec, IteratorSpec, LeafSpec, ObjectGraph
from jaxckpt.progress import Meter, Report, silent
from jaxckpt.reader import CheckpointReader
from jaxckpt.storage import devices
from jaxckpt.storage.chunks import TARGET_BYTES
from jaxckpt.storage.format.dtypes import numpy_dtype
from jaxckpt.storage.reads import ahead, cores
from jaxckpt.storage.slab import Slab

_T = TypeVar("_T")

# An array of fewer bytes is copied whatever the limit: not to copy it may take a program to be compiled.
_LARGE_BYTES = 8 << 20


def default_limit() -> int:
    """Host bytes on their way to a device, when nothing else is asked for: twice a chunk for each core.

    One half is read while the other is copied; on two cores, hence with 64 MiB, more than that is no faster.
    """
    return 2 * TARGET_BYTES * min(max(cores(), 2), 16)


class Unfilled:
    """Stands in a result for an abstract leaf that nothing has filled."""

    def __repr__(self) -> str:
        return "<not restored>"


UNFILLED = Unfilled()


def own_value(flat: Flat, index: int) -> Any:
    """What a leaf of the target is when nothing is restored into it."""
    spec = flat.graph.leaves[index].spec
    return UNFILLED if isinstance(spec, ArraySpec) and spec.abstract else flat.values[index]


class _Plain(Struct, frozen=True, gc=False):
    """A leaf whose value is the stored bytes as they are.

    Attributes:
        index: of the target's leaf.
        source: of the saved leaf.
        spec: of the target's leaf.
        nbytes: of the value.
    """

    index: int
    source: int
    spec: ArraySpec
    nbytes: int


class Filler:
    """One restore in progress.

    Args:
        reader: the opened checkpoint.
        graph: the target's graph.
        own: the target's leaves; None where there is no target, `jax.ShapeDtypeStruct`s to say where to.
        fills: one for each leaf: which saved leaves go there, and how.
        memory_limit: host bytes that may be held on the way.
        progress: called with (bytes done, bytes in all).
    """

    def __init__(
        self,
        reader: CheckpointReader,
        graph: ObjectGraph,
        own: Sequence[Any],
        fills: Sequence[Fill],
        *,
        memory_limit: int | None,
        progress: Report = silent,
    ) -> None:
        self._reader = reader
        self._saved = reader.graph.leaves
        self._leaves = graph.leaves
        self._own = own
        self._fills = fills
        # Two groups are held at once: one is read while the other goes to its device.
        self._limit = max(1, (memory_limit or default_limit()) // 2)
        self._progress = progress
        self._problems: list[Problem] = []
        self._iterators: list[tuple[Any, Any]] = []
        self.unequal: list[int] = []

    def fill(self, wanted: Sequence[int]) -> dict[int, Any]:
        """The values of these leaves (indices into the target's), but for those in `unequal`.

        Nothing has changed in place when this returns: see `finish`.

        Raises:
            RestoreError: a value, once read, does not fit.
        """
        # One array under two names of the target is made once, if it was saved with one value.
        stands_for = dict(zip(wanted, wanted, strict=True))
        if len({self._leaves[index].node for index in wanted}) < len(wanted):
            first: dict[Any, int] = {}
            stands_for = {index: first.setdefault(self._identity(index), index) for index in wanted}
        plain, others = self._sort(dict.fromkeys(stands_for.values()))
        sizes = {index: self._nbytes(index) for index in others}
        meter = Meter(self._progress, sum(sizes.values()) + sum([each.nbytes for each in plain]))
        # Beside what is read stands what it is converted to.
        held = [(index, nbytes + _nbytes(self._leaves[index].spec)) for index, nbytes in sizes.items()]
        # What may turn out not to fit comes first: then nothing is allocated for the rest.
        results: dict[int, Any] = {}
        for group in _groups(held, self._limit):
            results.update(self._fill_group(group, meter))
        if self._problems:
            raise RestoreError(f"{self._reader.path} does not fit the target:", self._problems)
        self._fill_plain(plain, results, meter)
        meter.finish()
        return {index: results[other] for index, other in stands_for.items() if other in results}

    def finish(self) -> None:
        """Sets the iterators: the one thing that a restore changes in place, after all else has succeeded."""
        for iterator, state in self._iterators:
            set_state(iterator, state)

    # Stored bytes as they are

    def _sort(self, indices: Iterable[int]) -> tuple[list[_Plain], list[int]]:
        """Leaves that are filled with stored bytes as they are, and all others."""
        plain: list[_Plain] = []
        others: list[int] = []
        sizes: dict[tuple[int, int], int] = {}  # by identity, which is cheap: specs are few and shared
        for index in indices:
            fill = self._fills[index]
            if fill.function is None and len(fill.sources) == 1:
                source = fill.sources[0]
                saved, wanted = self._saved[source].spec, self._leaves[index].spec
                kinds = (id(saved), id(wanted))
                if kinds not in sizes:
                    sizes[kinds] = _plain_nbytes(saved, wanted)
                if sizes[kinds] >= 0 and isinstance(wanted, ArraySpec):
                    plain.append(_Plain(index, source, wanted, sizes[kinds]))
                    continue
            others.append(index)
        return plain, others

    def _fill_plain(self, plain: Sequence[_Plain], results: dict[int, Any], meter: Meter) -> None:
        """Adds these to the results."""
        on_device = [i for i, each in enumerate(plain) if each.spec.array_type in ("jax", "key")]
        made = devices.blanks(
            [plain[i].spec for i in on_device],
            [self._own[plain[i].index] for i in on_device],
            large=max(self._limit, _LARGE_BYTES),
        )
        blanks = dict(zip(on_device, made, strict=True))
        direct = [i for i in range(len(plain)) if i not in blanks or blanks[i] is not None]
        read = self._reader.read(
            [plain[i].source for i in direct],
            into=[None if (blank := blanks.get(i)) is None else blank.memory for i in direct],
            done=meter.add,
        )
        numpy: dict[int, devices.Placement] = {}
        for i, value in zip(direct, read, strict=True):
            blank = blanks.get(i)
            if blank is None:
                numpy[plain[i].index] = devices.Placement(host=value, spec=plain[i].spec, owned=True)
            else:
                results[plain[i].index] = blank.array
        results.update(zip(numpy, devices.place(list(numpy.values())), strict=True))
        staged = [plain[i] for i in on_device if blanks[i] is None]
        self._copy(list(_groups([(each, each.nbytes) for each in staged], self._limit)), results, meter)

    def _copy(self, groups: Sequence[Sequence[_Plain]], results: dict[int, Any], meter: Meter) -> None:
        """Reads each group into host memory and gives it to the devices while the next one is read."""
        slabs = (Slab(), Slab())
        reads = [partial(self._read, group, slabs[i % 2], meter) for i, group in enumerate(groups)]
        with closing(ahead(reads)) as coming:
            for group, hosts in zip(groups, coming, strict=True):
                results.update(self._place(group, hosts))

    def _read(self, group: Sequence[_Plain], slab: Slab, meter: Meter) -> list[np.ndarray[Any, Any]]:
        memory = slab.cut([each.nbytes for each in group])
        self._reader.read([each.source for each in group], into=memory, done=meter.add)
        specs: list[Any] = [self._saved[each.source].spec for each in group]
        return [
            np.ndarray(spec.stored_shape, numpy_dtype(spec.dtype), part)
            for spec, part in zip(specs, memory, strict=True)
        ]

    def _place(self, group: Sequence[_Plain], hosts: Sequence[np.ndarray[Any, Any]]) -> dict[int, Any]:
        placements = [
            devices.Placement(host=host, spec=each.spec, like=self._own[each.index])
            for each, host in zip(group, hosts, strict=True)
        ]
        return dict(zip([each.index for each in group], devices.place(placements), strict=True))

    # Everything else

    def _fill_group(self, group: Sequence[int], meter: Meter) -> dict[int, Any]:
        uses = Counter(source for index in group for source in self._fills[index].sources)
        sources = sorted(uses)
        values = dict(zip(sources, self._reader.read(sources, _make, done=meter.add), strict=True))
        results: dict[int, Any] = {}
        places: dict[int, devices.Placement] = {}
        for index in group:
            leaf, own, fill = self._leaves[index], self._own[index], self._fills[index]
            if fill.equal and not same([values[source] for source in fill.sources]):
                self.unequal.append(index)
                continue
            try:
                value = self._value(index, values)
            except MisfitError as misfit:
                self._problems.append(misfit.problem(leaf.key))
                continue
            if isinstance(leaf.spec, ArraySpec):
                owned = fill.function is None and uses[fill.sources[0]] == 1
                places[index] = devices.Placement(host=value, spec=leaf.spec, like=own, owned=owned)
            elif isinstance(leaf.spec, IteratorSpec) and own is not None:
                self._iterators.append((own, value))
                results[index] = own
            else:
                results[index] = value
        if not self._problems:  # after a misfit nothing more is allocated
            results.update(zip(places, devices.place(list(places.values())), strict=True))
        return results

    def _value(self, index: int, values: Mapping[int, Any]) -> Any:
        """The host value of one leaf of the target, as the target has it."""
        fill, leaf = self._fills[index], self._leaves[index]
        saved = [self._saved[source] for source in fill.sources]
        if fill.function is not None:
            arrays = [np.asarray(values[source]) for source in fill.sources]
            try:
                result = fill.function(arrays)
            except Exception as error:
                error.add_note(f"This is the transform of {describe(saved)} to {leaf.key}.")
                raise
            return check_result(result, leaf.spec, describe(saved))
        return convert(values[fill.sources[0]], saved[0].spec, leaf.spec, cast=fill.cast)

    def _identity(self, index: int) -> Any:
        fill, leaf = self._fills[index], self._leaves[index]
        if fill.function is not None or not isinstance(leaf.spec, ArraySpec):
            return index
        return leaf.node, tuple(map(self._reader.digest, fill.sources))

    def _nbytes(self, index: int) -> int:
        return sum([self._reader.nbytes(source) for source in self._fills[index].sources])


def _plain_nbytes(saved: LeafSpec, wanted: LeafSpec) -> int:
    """Bytes of a stored array that is what is wanted as it is; -1 for all else."""
    if not isinstance(saved, ArraySpec) or not isinstance(wanted, ArraySpec) or saved.dtype != wanted.dtype:
        return -1
    return _nbytes(saved) if saved.stored_shape == wanted.stored_shape else -1


def _nbytes(spec: LeafSpec) -> int:
    """Bytes of an array; 0 for anything else."""
    if not isinstance(spec, ArraySpec):
        return 0
    return math.prod(spec.stored_shape) * numpy_dtype(spec.dtype).itemsize


def _groups(sizes: Iterable[tuple[_T, int]], limit: int) -> Iterator[list[_T]]:
    """Runs of items whose bytes fit the limit; a larger item is a group of its own."""
    group: list[_T] = []
    size = 0
    for item, nbytes in sizes:
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _make(value: Any, spec: ArraySpec) -> Any:
    """An array inside an iterator's state, as it was saved."""
    return devices.place([devices.Placement(host=value, spec=spec)])[0]


def set_state(iterator: Any, state: Any) -> None:
    """Sets an iterator to a copy of the state."""
    own = copy.deepcopy(state)
    if hasattr(iterator, "set_state"):
        iterator.set_state(own)
    else:
        iterator.load_state_dict(own)


def fill_matched(
    reader: CheckpointReader,
    flat: Flat,
    found: Match,
    wanted: Sequence[int],
    values: Sequence[Any],
    *,
    memory_limit: int | None,
    progress: Report = silent,
) -> tuple[tuple[Any, ...], Match]:
    """Carries out a match.

    Args:
        reader: the opened checkpoint.
        flat: the target.
        found: its match, checked.
        wanted: the leaves to fill.
        values: what all leaves are so far.
        memory_limit: as of `restore`.
        progress: called with (bytes done, bytes in all).

    Returns:
        The values with those filled in, and the match as it turned out.

    Raises:
        RestoreError: a value does not fit; nothing was changed.
    """
    filler = Filler(
        reader, flat.graph, flat.values, found.fills, memory_limit=memory_limit, progress=progress
    )
    filled = filler.fill(wanted)
    if filler.unequal:
        found = found.revise(unequal=filler.unequal)
        found.check(reader.path)
    filler.finish()
    return tuple(filled.get(index, value) for index, value in enumerate(values)), found
