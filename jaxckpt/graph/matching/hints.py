"""What to do about a problem: the nearest saved name, another layout of the same numbers, an option."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jaxckpt.errors import Problem
from jaxckpt.graph.matching.view import state_container
from jaxckpt.graph.model import ArraySpec, Leaf

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jaxckpt.graph.matching.clash import Finding

#: Comparing spellings is slow, so only this many problems get it, each with this many names.
NEAREST, COMPARED = 25, 100
_NUMBERED = re.compile(r"(?:_?)\d+$")


@dataclass(kw_only=True)
class Hints:
    """Completes problems.

    Attributes:
        seen: the saved leaves as ``rename=`` and ``transform=`` name them.
        placed: the same after renames.
        target: the target's leaves.
        used: saved indices that were restored.
        lost: target indices that were not.
    """

    seen: Sequence[Leaf | None]
    placed: Sequence[Leaf | None]
    target: Sequence[Leaf]
    used: Collection[int]
    lost: Collection[int]
    budget: int = NEAREST

    def complete(self, finding: Finding) -> Problem:
        """The problem with its hint."""
        hint = finding.hint
        if finding.kind == "missing" and not hint:
            hint = self._missing(self.target[finding.target])
        elif finding.kind == "shape":
            hint = self._shape(finding)
        elif finding.kind == "dtype":
            hint = self._dtype(finding)
        elif finding.kind == "kind" and not hint and finding.target >= 0:
            hint = f"fresh=({self._owner(self.target[finding.target])!r},) keeps the target's own"
        return Problem(
            key=finding.key, kind=finding.kind, saved=finding.saved, wanted=finding.wanted, hint=hint
        )

    def _owner(self, leaf: Leaf) -> str:
        """The key to name in an option: of a slot whose parameter is lost too the parameter's."""
        if leaf.variable is not None and leaf.variable in self._lost_keys:
            return leaf.variable
        return leaf.key

    @cached_property
    def _lost_keys(self) -> set[str]:
        return {self.target[index].key for index in self.lost}

    @cached_property
    def _free(self) -> list[Leaf]:
        """Saved variables outside optimizers that nothing took."""
        return [
            leaf
            for index, leaf in enumerate(self.seen)
            if leaf is not None and leaf.state is None and index not in self.used and leaf.kind != "callable"
        ]

    def _missing(self, leaf: Leaf) -> str:
        keep = f"partial=({leaf.key!r},) keeps the target's own value"
        if leaf.variable is not None and leaf.variable in self._lost_keys:
            return f"A slot follows its parameter {leaf.variable!r}; partial=({leaf.variable!r},) keeps both"
        if leaf.state is not None:
            return self._other_state(leaf) or f"A new state of the optimizer? {keep}"
        layout = self._stacked(leaf) or self._unstacked(leaf)
        if layout:
            return layout
        near = self._nearest(leaf)
        if near is None:
            return keep
        old, new = _trimmed(near, leaf.key)
        return f"did you mean {near!r}? rename={{{old!r}: {new!r}}} takes it; {keep}"

    def _nearest(self, leaf: Leaf) -> str | None:
        if self.budget <= 0:
            return None
        self.budget -= 1
        last = leaf.key.rpartition("/")[2]
        alike = self._by_last.get(last, [])
        same = [key for key, form in alike if form == _form(leaf)] or [key for key, _ in alike]
        close = difflib.get_close_matches(leaf.key, same[:COMPARED], n=1, cutoff=0.3)
        if not close:
            pool = [other.key for other in self._free if _form(other) == _form(leaf)]
            pool = pool or [other.key for other in self._free]
            close = difflib.get_close_matches(leaf.key, pool[:COMPARED], n=1, cutoff=0.6)
        return close[0] if close else None

    @cached_property
    def _by_last(self) -> dict[str, list[tuple[str, object]]]:
        found: dict[str, list[tuple[str, object]]] = {}
        for leaf in self._free:
            found.setdefault(leaf.key.rpartition("/")[2], []).append((leaf.key, _form(leaf)))
        return found

    def _other_state(self, leaf: Leaf) -> str:
        """The same field of the same parameter (or of the same name) under another class or optimizer."""
        state = leaf.state
        assert state is not None
        for index in self._states.get((state.field, leaf.variable or state.path), ()):
            seen, moved = self.seen[index], self.placed[index]
            if seen is None or seen.state is None or moved is None or moved.state is None:
                continue
            if moved.state.optimizer != state.optimizer:
                old, new = seen.state.optimizer, state.optimizer
            elif moved.state.state_class != state.state_class:
                old, new = state_container(seen.state), state_container(state)
            else:
                continue
            return f"did you mean {seen.key!r}? rename={{{old!r}: {new!r}}} takes it"
        return ""

    @cached_property
    def _states(self) -> dict[tuple[str, str | tuple[str, ...]], list[int]]:
        found: dict[tuple[str, str | tuple[str, ...]], list[int]] = {}
        for index, leaf in enumerate(self.placed):
            if leaf is not None and leaf.state is not None and index not in self.used:
                found.setdefault((leaf.state.field, leaf.variable or leaf.state.path), []).append(index)
        return found

    def _stacked(self, leaf: Leaf) -> str:
        if not isinstance(leaf.spec, ArraySpec) or not leaf.spec.shape:
            return ""
        for pattern, items in self._layers.get(leaf.key, {}).items():
            specs = [item.spec for item in items]
            first = specs[0]
            if not isinstance(first, ArraySpec) or len({_form(item) for item in items}) > 1:
                continue
            if leaf.spec.shape == (len(items), *first.shape):
                return (
                    f"stacked? the checkpoint has {items[0].key!r} ({first}) and {len(items) - 1} like it: "
                    f"transform={{{leaf.key!r}: ({pattern!r}, jnp.stack)}}"
                )
        return ""

    @cached_property
    def _layers(self) -> dict[str, dict[str, list[Leaf]]]:
        """By a key without one number in it, and by the pattern with a star for the number: the leaves."""
        found: dict[str, dict[str, list[Leaf]]] = {}
        for leaf in self._free:
            for reduced, pattern in _without_number(leaf.key):
                found.setdefault(reduced, {}).setdefault(pattern, []).append(leaf)
        return found

    def _unstacked(self, leaf: Leaf) -> str:
        if not isinstance(leaf.spec, ArraySpec):
            return ""
        for reduced, pattern in _without_number(leaf.key):
            whole = self._by_key.get(reduced)
            spec = whole.spec if whole is not None else None
            if isinstance(spec, ArraySpec) and spec.shape[1:] == leaf.spec.shape and len(spec.shape) > 0:
                return (
                    f"unstacked? the checkpoint has {reduced!r} ({spec}): "
                    f"transform={{{pattern!r}: ({reduced!r}, lambda a, i: a[i])}}"
                )
        return ""

    @cached_property
    def _by_key(self) -> dict[str, Leaf]:
        return {leaf.key: leaf for leaf in self._free}

    def _shape(self, finding: Finding) -> str:
        leaf, source = self.target[finding.target], self.seen[finding.source]
        keep = f"fresh=({self._owner(leaf)!r},) keeps the target's own"
        if leaf.variable is None:
            keep += " (and its slots)" if leaf.state is None else ""
        elif leaf.variable in self._lost_keys:
            keep += " parameter and its slots"
        if source is None or not isinstance(source.spec, ArraySpec) or not isinstance(leaf.spec, ArraySpec):
            return keep
        old, new = source.spec.shape, leaf.spec.shape
        name = f"{leaf.key!r}: ({source.key!r}"
        if leaf.variable is not None and leaf.variable in self._lost_keys:
            return keep
        if old != new and sorted(old) == sorted(new):
            return f"transposed? transform={{{name}, jnp.transpose)}}; {keep}"
        if [size for size in old if size != 1] == [size for size in new if size != 1]:
            return f"squeezed? transform={{{name}, lambda a: a.reshape({new}))}}; {keep}"
        return keep

    def _dtype(self, finding: Finding) -> str:
        leaf = self.target[finding.target]
        keep = f"fresh=({self._owner(leaf)!r},) keeps the target's own"
        if finding.hint:
            return f"cast=({leaf.key!r},) or cast=True converts it; {keep}"
        return f"cast= converts within a kind of numbers only; {keep}"


def _form(leaf: Leaf) -> object:
    return (leaf.spec.shape, leaf.spec.dtype) if isinstance(leaf.spec, ArraySpec) else leaf.spec.kind


def _trimmed(old: str, new: str) -> tuple[str, str]:
    """Two keys without the names that they end in alike: a rule that also serves their neighbours."""
    ours, theirs = old.split("/"), new.split("/")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "/".join(ours), "/".join(theirs)


def _without_number(key: str) -> list[tuple[str, str]]:
    """The key without one of its numbers, and with a star for it: ``a/0/k`` and ``a_0/k`` give ``a/k``."""
    names = key.split("/")
    found: list[tuple[str, str]] = []
    for place, name in enumerate(names):
        match = _NUMBERED.search(name)
        if match is None:
            continue
        head = name[: match.start()]
        kept = [*names[:place], *([head] if head else []), *names[place + 1 :]]
        star = re.sub(r"\d+$", "*", name)
        if kept:
            found.append(("/".join(kept), "/".join([*names[:place], star, *names[place + 1 :]])))
    return found
