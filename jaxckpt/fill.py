"""Filling a target: read in groups that fit the memory limit, convert, make arrays."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxckpt.convert import MisfitError, check_result, convert, describe, same
from jaxckpt.errors import Problem, ProblemKind, RestoreError
from jaxckpt.graph.flatten import Flat, flatten
from jaxckpt.graph.match import Fill, Match
from jaxckpt.graph.model import ArraySpec, IteratorSpec, Leaf, LeafSpec, ObjectGraph
from jaxckpt.initialize import Initializer
from jaxckpt.progress import Report, silent
from jaxckpt.reader import CheckpointReader
from jaxckpt.storage import devices

#: Host bytes read at once, when nothing else is asked for.
DEFAULT_MEMORY_LIMIT = 2 << 30


class Unfilled:
    """Stands in a result for an abstract leaf that nothing has filled."""

    def __repr__(self) -> str:
        return "<not restored>"


UNFILLED = Unfilled()


def own_value(flat: Flat, index: int) -> Any:
    """What a leaf of the target is when nothing is restored into it."""
    spec = flat.graph.leaves[index].spec
    return UNFILLED if isinstance(spec, ArraySpec) and spec.abstract else flat.values[index]


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
        self._leaves = graph.leaves
        self._own = own
        self._fills = fills
        self._limit = max(1, (memory_limit or DEFAULT_MEMORY_LIMIT) // 2)
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
        first: dict[Any, int] = {}
        stands_for = {index: first.setdefault(self._identity(index), index) for index in wanted}
        results: dict[int, Any] = {}
        sizes = {index: self._nbytes(index) for index in first.values()}
        total, done = sum(sizes.values()), 0
        for group in self._groups(sizes):
            results.update(self._fill_group(group))
            done += sum(sizes[index] for index in group)
            self._progress(done, total)
        if self._problems:
            raise RestoreError(f"{self._reader.path} does not fit the target:", self._problems)
        return {index: results[other] for index, other in stands_for.items() if other in results}

    def finish(self) -> None:
        """Sets the iterators: the one thing that a restore changes in place, after all else has succeeded."""
        for iterator, state in self._iterators:
            set_state(iterator, state)

    def _fill_group(self, group: Sequence[int]) -> dict[int, Any]:
        uses = Counter(source for index in group for source in self._fills[index].sources)
        sources = sorted(uses)
        values = dict(zip(sources, self._reader.read(sources, _make), strict=True))
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
        saved = [self._reader.graph.leaves[source] for source in fill.sources]
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

    def _groups(self, sizes: Mapping[int, int]) -> Iterator[list[int]]:
        """Runs of leaves whose bytes fit the limit; a larger leaf is a group of its own."""
        group: list[int] = []
        size = 0
        for index, nbytes in sizes.items():
            if group and size + nbytes > self._limit:
                yield group
                group, size = [], 0
            group.append(index)
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


def initialize_leaves(flat: Flat, wanted: Sequence[int], initializer: Initializer) -> list[Any]:
    """The values that an initializer gives for these leaves of a target, all of them abstract arrays.

    Raises:
        RestoreError: it lacks one, or gives another kind, shape or dtype.
    """
    given = flatten(initializer.target, target=True)
    problems: list[Problem] = []
    found: list[int] = []
    for index in wanted:
        leaf = flat.graph.leaves[index]
        other = given.graph.by_key.get(leaf.key)
        problem = _unfit(leaf, None if other is None else given.graph.leaves[other].spec)
        if problem is not None:
            problems.append(problem)
        elif other is not None:
            found.append(other)
    if problems:
        raise RestoreError("init_fn does not fit the target:", problems)
    likes = [flat.values[index] for index in wanted]
    computed = initializer.compute(found, [getattr(like, "sharding", None) for like in likes])
    values = [
        given.values[other] if value is None else value for other, value in zip(found, computed, strict=True)
    ]
    specs = [flat.graph.leaves[index].spec for index in wanted]
    return devices.conform(values, specs, likes)


def _unfit(leaf: Leaf, given: LeafSpec | None) -> Problem | None:
    """What is wrong with what an initializer gives for a leaf, if anything."""
    wanted = leaf.spec
    kind: ProblemKind | None = None
    if given is None:
        kind = "missing"
    elif not isinstance(given, ArraySpec) or not isinstance(wanted, ArraySpec) or given.impl != wanted.impl:
        kind = "kind"
    elif given.shape != wanted.shape:
        kind = "shape"
    elif given.dtype != wanted.dtype:
        kind = "dtype"
    if kind is None:
        return None
    saved = "nothing from init_fn" if given is None else f"{given} from init_fn"
    return Problem(
        key=leaf.key, kind=kind, saved=saved, wanted=str(wanted), hint="init_fn gives the whole tree"
    )


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
