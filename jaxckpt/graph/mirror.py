"""Which parameters a field of an optimizer's state mirrors: trees compared by names, not by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxckpt.graph.model import ArraySpec, LeafSpec, Structure, ValueSpec, spell

_DICTS = frozenset(("dict", "OrderedDict", "defaultdict", "FrozenDict"))


@dataclass(slots=True, eq=False)
class Tree:
    """A position of the tree. Transparent steps are folded into the child that they hold.

    Attributes:
        structure: what is there.
        path: escaped names from the root.
        depth: how many.
        leaves: how many leaves it has.
        children: by name, in JAX's order.
        marks: class names of the transparent containers around it, outermost first.
    """

    structure: Structure
    path: tuple[str, ...]
    leaves: int
    children: dict[str, Tree] = field(default_factory=dict[str, "Tree"])
    marks: tuple[str, ...] = ()

    @property
    def leaf(self) -> int:
        return self.structure.leaf

    @property
    def is_leaf(self) -> bool:
        return self.structure.type == "leaf"

    @property
    def is_dict(self) -> bool:
        return self.structure.type in _DICTS

    @property
    def is_hole(self) -> bool:
        """Whether it may stand for a parameter that is not there: None, or optax's MaskedNode."""
        return self.structure.type == "none" or self.cls == "MaskedNode"

    @property
    def cls(self) -> str:
        """The class's name, without its module."""
        if self.structure.type == "none":
            return "None"
        return self.structure.cls.rpartition(":")[2].rpartition(".")[2] or self.structure.type

    @property
    def key(self) -> str:
        return spell(self.path)

    def filled(self) -> frozenset[str]:
        """Names of the children that have leaves."""
        return frozenset(name for name, child in self.children.items() if child.leaves)

    def walk(self) -> Iterator[Tree]:
        """It and everything below, parents first, in JAX's order."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def all_leaves(self) -> Iterator[Tree]:
        return (tree for tree in self.walk() if tree.is_leaf)


def grow(structure: Structure, path: tuple[str, ...] = (), marks: tuple[str, ...] = ()) -> Tree:
    """The tree of a structure."""
    if structure.type == "leaf":
        return Tree(structure, path, 1, marks=marks)
    if len(structure.names) == 1 and not structure.names[0].name:
        return grow(structure.children[0], path, (*marks, structure.cls))
    # The root of a Checkpoint stands under the empty name, at its parent's path.
    children = {
        name.name: grow(child, (*path, name.name) if name.name else path)
        for name, child in zip(structure.names, structure.children, strict=True)
    }
    return Tree(structure, path, sum(child.leaves for child in children.values()), children, marks)


@dataclass(frozen=True, slots=True)
class Pair:
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

    def _match(self, found: Mirror, state: Tree, parameter: Tree, path: tuple[str, ...], *, lenient: bool) -> bool:
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
    return spec.array_type != "key" and (name.startswith(("float", "bfloat", "complex")) or name[:1] in ("f", "c"))


def candidates(root: Tree, inside: Callable[[Tree], bool]) -> list[Tree]:
    """Every tree that parameters may be, shallowest first: in the order of the graph's edges.

    Args:
        root: the whole tree.
        inside: whether a subtree is an optimizer's, and so holds no parameters.
    """
    found: list[Tree] = []
    level = [root]
    while level:
        level = [tree for tree in level if tree.leaves and not inside(tree)]
        found += [tree for tree in level if not tree.is_leaf]
        level = [child for tree in level for child in tree.children.values()]
    return found
