"""The result of a restore: a new tree, what became of each leaf, and more parts attached later."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jaxckpt.errors import RestoreError, RestoreIgnoredWarning
from jaxckpt.fill import UNFILLED, fill_matched, own_value
from jaxckpt.graph.flatten import Flat, flatten
from jaxckpt.graph.grow import grow
from jaxckpt.graph.match import match
from jaxckpt.graph.model import ObjectGraph
from jaxckpt.graph.rules import Rules
from jaxckpt.graph.status import RestoreStatus
from jaxckpt.initialize import Initializer, initialize_leaves, trace
from jaxckpt.reader import CheckpointReader


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a `Restored` is made of.

    Attributes:
        flat: the target, flattened.
        values: one for each of its leaves; `UNFILLED` for an abstract leaf that has none.
        status: the outcome.
        reader: the opened checkpoint, or None where there was none.
        rules: what was asked for.
        memory_limit: host bytes for reading.
    """

    flat: Flat
    values: tuple[Any, ...]
    status: RestoreStatus
    reader: CheckpointReader | None
    rules: Rules
    memory_limit: int | None = None

    @classmethod
    def nothing(cls, flat: Flat, values: tuple[Any, ...], rules: Rules) -> State:
        """Of a restore from no checkpoint: the target's own values."""
        status = RestoreStatus.nothing(value_keys(flat))
        return cls(flat=flat, values=values, status=status, reader=None, rules=rules)


class Restored:
    """The result of a restore: a new tree and what became of each leaf. ``tree, status = restore(...)``.

    A restore changes nothing in place, so a result that is never looked at is warned about.

    Attributes:
        tree: the target's structure with the saved values.
        status: which leaf came from where.
    """

    __slots__ = ("_looked_at", "_state")

    def __init__(self, state: State) -> None:
        self._state = state
        self._looked_at = False

    @property
    def tree(self) -> Any:
        """The restored tree.

        Raises:
            RestoreError: abstract leaves are missing: `initialize` fills them.
        """
        self._looked_at = True
        state = self._state
        unfilled = [
            leaf.key
            for leaf, value in zip(state.flat.graph.leaves, state.values, strict=True)
            if value is UNFILLED
        ]
        if unfilled:
            raise RestoreError(
                f"{_listed(unfilled)}: abstract in the target and not in the checkpoint. Fill what is "
                "missing with .initialize(init_fn), or give arrays in the target"
            )
        return state.flat.unflatten(state.values)

    @property
    def status(self) -> RestoreStatus:
        """Which leaf came from where."""
        self._looked_at = True
        return self._state.status

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tree, self.status))

    def __getitem__(self, key: object) -> NoReturn:
        self._looked_at = True  # told once is enough
        raise TypeError(f"a Restored is not the tree: use .tree[{key!r}], or tree, status = restore(...)")

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("_"):
            self._looked_at = True
        raise AttributeError(f"a Restored has no {name!r}: use .tree.{name}, or tree, status = restore(...)")

    def __repr__(self) -> str:
        return f"<Restored {self._state.status!r}>"

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # (A default, since the names of this module may be gone when the interpreter ends.)
        try:
            looked_at = self._looked_at
        except AttributeError:  # never made
            return
        if not looked_at and not is_finalizing():  # nothing is printed at exit
            warnings.warn(
                "the result of jaxckpt.restore was never used: nothing is restored in place; "
                "write tree, status = jaxckpt.restore(...)",
                RestoreIgnoredWarning,
                stacklevel=2,
                source=self,
            )

    def assert_consumed(self) -> Restored:
        """Every saved value was restored, or RestoreAssertionError names those that were not."""
        return self._checked(self._state.status.assert_consumed)

    def assert_existing_objects_matched(self) -> Restored:
        """Every leaf of the target was restored, or RestoreAssertionError names those that were not."""
        return self._checked(self._state.status.assert_existing_objects_matched)

    def assert_nontrivial_match(self) -> Restored:
        """Something was restored."""
        return self._checked(self._state.status.assert_nontrivial_match)

    def expect_partial(self) -> Restored:
        """Says that unused values are no surprise."""
        self._state.status.expect_partial()
        return self

    def _checked(self, assertion: Callable[[], object]) -> Restored:
        looked_at, self._looked_at = self._looked_at, True  # what fails an assertion was not ignored
        assertion()
        self._looked_at = looked_at
        return self

    def attach(self, key: str, value: Any) -> Restored:
        """The tree with one more part, whose leaves have their saved values.

        Args:
            key: where, as a key ("net/l1", "listed/0"); what is missing on the way becomes dicts.
            value: the part, a target like any other. A name that was never saved keeps the given value
                and is in ``status.missing``.

        Returns:
            A new `Restored` with the current status.

        Raises:
            RestoreError: a shape, dtype or kind differs.
            ValueError: the place is taken.
        """
        state = self._state
        grown = grow(state.flat.unflatten(_stand_ins(state)), key.split("/"), value)
        flat = flatten(grown, target=True)
        known = {position: index for index, position in enumerate(_positions(state.flat.graph))}
        olds = [known.get(position) for position in _positions(flat.graph)]
        self._looked_at = True
        return Restored(_attached(state, flat, olds))

    def initialize(self, init_fn: Callable[[], Any] | Initializer) -> Restored:
        """Computes the abstract leaves that the checkpoint did not have, and only those.

        Args:
            init_fn: called once, traced; returns the whole tree. Leaves of it that are no arrays are taken
                as they are.

        Raises:
            RestoreError: it lacks a leaf, or gives another shape or dtype.
        """
        state = self._state
        wanted = [index for index, value in enumerate(state.values) if value is UNFILLED]
        self._looked_at = True
        if not wanted:
            return Restored(state)
        initializer = init_fn if isinstance(init_fn, Initializer) else trace(init_fn)
        values = list(state.values)
        for index, value in zip(wanted, initialize_leaves(state.flat, wanted, initializer), strict=True):
            values[index] = value
        return Restored(replace(state, values=tuple(values)))


def _attached(state: State, flat: Flat, olds: list[int | None]) -> State:
    values = [own_value(flat, index) if old is None else state.values[old] for index, old in enumerate(olds)]
    if state.reader is None:
        return State.nothing(flat, tuple(values), state.rules)
    found = match(state.reader.graph, flat.graph, replace(state.rules, attach=True))
    found.check(state.reader.path)
    # What is new is read; so is what had no source until the new part came.
    restored = state.status.restored
    wanted = [
        index
        for index, old in enumerate(olds)
        if found.fills[index].why == "restored"
        and (old is None or state.flat.graph.leaves[old].key not in restored)
    ]
    filled, found = fill_matched(state.reader, flat, found, wanted, values, memory_limit=state.memory_limit)
    return replace(state, flat=flat, values=filled, status=found.status)


def value_keys(flat: Flat) -> list[str]:
    """Keys of a target's leaves that are values."""
    return [leaf.key for leaf in flat.graph.leaves if leaf.kind in ("array", "value", "iterator")]


def _stand_ins(state: State) -> list[Any]:
    """The values so far, with the target's own abstract leaf where nothing has been filled in."""
    return [
        own if value is UNFILLED else value
        for own, value in zip(state.flat.values, state.values, strict=True)
    ]


def _positions(graph: ObjectGraph) -> list[tuple[tuple[str, str], ...]]:
    """For each leaf its path, which unlike its key does not change when other parts come."""
    paths: list[tuple[tuple[str, str], ...]] = [()] * len(graph.leaves)
    for path, structure in graph.walk():
        if structure.leaf >= 0:
            paths[structure.leaf] = tuple((name.type, name.text) for name in path)
    return paths


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
