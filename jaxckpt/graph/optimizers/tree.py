"""A tree as the search for optimizers sees it: by names, transparent containers folded away. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxckpt.graph.model import Structure, spell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: NamedTuples of optax that are no states: what stands in the place of a parameter, and functions.
_NO_STATES = frozenset(
    (
        "LookaheadParams",
        "SplitRealAndImaginaryArrays",
        "MaskedNode",
        "MuonDimensionNumbers",
        "GaLoreDimensionNumbers",
        "GradientTransformation",
        "GradientTransformationExtraArgs",
    )
)
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
        has_state: whether a state of optax is anywhere in it.
        marks: class names of the transparent containers around it, outermost first.
    """

    structure: Structure
    path: tuple[str, ...]
    leaves: int
    has_state: bool = False
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
    def is_optax(self) -> bool:
        """Whether it is one of optax's own states."""
        module = self.structure.cls.partition(":")[0]
        return self.may_be_state and (module == "optax" or module.startswith("optax."))

    @property
    def may_be_state(self) -> bool:
        """Whether it is a NamedTuple, but none of optax's that are no states."""
        return self.structure.type == "namedtuple" and self.cls not in _NO_STATES

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
    tree = Tree(
        structure, path, sum(child.leaves for child in children.values()), children=children, marks=marks
    )
    tree.has_state = tree.is_optax or any(child.has_state for child in children.values())
    return tree


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
