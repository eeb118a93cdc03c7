"""Which parameters a field of an optimizer's state mirrors: trees compared by names, not by position."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct

from jaxckpt.graph.model import ArraySpec, LeafSpec, ValueSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxckpt.graph.optimizers.tree import Tree


class Pair(Struct, frozen=True):
    """One slot: a leaf of a state, and the parameter that it is for.

    Attributes:
        slot: index of the leaf.
        variable: index of the parameter's leaf.
        path: the parameter's path in its tree.
        suffix: names behind that path in the state.
    """

    slot: int
    variable: int
    path: tuple[str, ...]
    suffix: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Mirror:
    """How a state's tree fits parameters.

    Attributes:
        parameters: the tree of parameters.
        pairs: one for each leaf of the state's tree, in order.
        loose: it fits only with suffixes, or the state lacks parameters.
        same: the shapes are those of the parameters.
        score: how near the shapes are otherwise; greater is nearer.
    """

    parameters: Tree
    pairs: list[Pair] = field(default_factory=list[Pair])
    loose: bool = False
    same: bool = True
    score: int = 0


def is_variable(spec: LeafSpec) -> bool:
    """Whether an optimizer may keep slots for such a leaf."""
    if isinstance(spec, ValueSpec):
        return spec.type in ("int", "float", "complex")
    return spec.kind in ("array", "skipped")


def _shape(spec: LeafSpec) -> tuple[int, ...] | None:
    return spec.shape if isinstance(spec, ArraySpec) else ()


def _is_subsequence(short: Sequence[int], long: Sequence[int]) -> bool:
    rest = iter(long)
    return all(size in rest for size in short)


class Matcher:
    """Compares trees of states with trees of parameters, over the leaves of one tree."""

    def __init__(self, specs: Sequence[LeafSpec]) -> None:
        self._specs = specs

    def mirror(self, state: Tree, parameters: Tree) -> Mirror | None:
        """How `state` mirrors `parameters`, if every path of theirs is one of its own and the reverse.

        A hole of the state may stand for a parameter or for a whole subtree of them. Of an `nnx.State`
        parameters may be missing (one that an optimizer was told to leave alone).
        """
        found = Mirror(parameters)
        if not self._match(found, state, parameters, (), lenient=False) or not found.pairs:
            return None
        return found

    def _match(
        self, found: Mirror, state: Tree, parameter: Tree, path: tuple[str, ...], *, lenient: bool
    ) -> bool:
        if parameter.is_leaf:
            return self._match_leaf(found, state, parameter, path)
        if not parameter.leaves:
            return not state.leaves
        if state.is_hole:
            return True
        if state.is_leaf:
            return False
        lenient = lenient or state.structure.cls == "flax.nnx.statelib:State"
        for name, child in parameter.children.items():
            if not child.leaves:
                continue
            other = state.children.get(name)
            if other is None:
                if not lenient:
                    return False
                found.loose = True
            elif not self._match(found, other, child, (*path, name) if name else path, lenient=lenient):
                return False
        theirs = parameter.children
        return all(name in theirs and theirs[name].leaves for name in state.filled())

    def _match_leaf(self, found: Mirror, state: Tree, parameter: Tree, path: tuple[str, ...]) -> bool:
        if not state.leaves:
            return True
        spec = self._specs[parameter.leaf]
        if not is_variable(spec):
            return False
        if state.is_leaf:
            found.pairs.append(Pair(state.leaf, parameter.leaf, path, ()))
            self._compare(found, self._specs[state.leaf], spec)
            return True
        found.loose, found.same = True, False
        for leaf in state.all_leaves():
            found.pairs.append(Pair(leaf.leaf, parameter.leaf, path, leaf.path[len(state.path) :]))
        return True

    @staticmethod
    def _compare(found: Mirror, slot: LeafSpec, variable: LeafSpec) -> None:
        if slot.kind == "skipped" or variable.kind == "skipped":
            return
        ours, theirs = _shape(slot) or (), _shape(variable) or ()
        if ours == theirs:
            found.score += 2
            return
        found.same = False
        # Factored moments drop a dimension of their parameter.
        found.score += _is_subsequence(ours, theirs)

    def bare(self, slot: int, variable: int) -> bool:
        """Whether a lone array may be the slot of a lone array: equal shapes of inexact numbers."""
        ours, theirs = self._specs[slot], self._specs[variable]
        if not isinstance(ours, ArraySpec) or not isinstance(theirs, ArraySpec):
            return False
        return ours.shape == theirs.shape and is_inexact(ours) and is_inexact(theirs)

    def ndim(self, leaf: int) -> int:
        spec = self._specs[leaf]
        return len(spec.shape) if isinstance(spec, ArraySpec) else 0


def is_inexact(spec: ArraySpec) -> bool:
    """Whether an array is of floats or complex numbers (a key or a counter is no parameter)."""
    name = spec.dtype.lstrip("<>=|")
    return spec.array_type != "key" and (
        name.startswith(("float", "bfloat", "complex")) or name[:1] in ("f", "c")
    )
