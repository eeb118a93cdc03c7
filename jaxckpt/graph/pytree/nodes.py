"""Named leaves to the nodes, edges and slots of a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxckpt.graph.model import (
    ROOT,
    Edge,
    Leaf,
    LeafSpec,
    Node,
    NodeKind,
    ObjectGraph,
    SkippedSpec,
    Slot,
    Structure,
    spell,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxckpt.graph.optimizers.tree import Tree
    from jaxckpt.graph.slots import Places


@dataclass(slots=True, eq=False)
class _Box:
    """A container and its edges; a leaf is its index."""

    path: tuple[str, ...]
    kind: NodeKind
    type: str
    children: dict[str, _Box | int] = field(default_factory=dict[str, "_Box | int"])


def build(
    structure: Structure,
    places: Places,
    specs: Sequence[LeafSpec],
    first: Mapping[int, int],
) -> ObjectGraph:
    """The graph of a tree.

    Args:
        structure: the tree.
        places: where its leaves stand.
        specs: what they are.
        first: for each leaf whose object also stands at an earlier position, that position's leaf.
    """
    root = _Grower(places).grow(places.root)
    nodes: list[Node] = []
    edges: list[Edge] = []
    of_leaf: dict[int, int] = {}

    def leaf_node(leaf: int, kind: NodeKind) -> int:
        shared = first.get(leaf, leaf)
        if shared not in of_leaf:
            of_leaf[shared] = len(nodes)
            nodes.append(Node(key=places.leaves[leaf].key, kind=kind, type=str(specs[leaf])))
        of_leaf[leaf] = of_leaf[shared]
        return of_leaf[leaf]

    def node(box: _Box | int) -> int:
        if isinstance(box, int):
            return leaf_node(box, _kind(specs[box]))
        nodes.append(Node(key=spell(box.path), kind=box.kind, type=box.type))
        queue.append((len(nodes) - 1, box))
        return len(nodes) - 1

    # Breadth first: a node is met first by the shortest of its paths, ties in the order of edges.
    queue: list[tuple[int, _Box]] = []
    node(root)
    for parent, box in queue:
        for name, child in box.children.items():
            edges.append(Edge(parent=parent, name=name, child=node(child)))

    leaves: list[Leaf] = []
    slots: list[Slot] = []
    for index, (place, spec) in enumerate(zip(places.leaves, specs, strict=True)):
        variable = None if place.variable is None else places.leaves[place.variable].key
        number = leaf_node(index, "slot") if place.path is None else of_leaf[index]
        leaves.append(Leaf(key=place.key, node=number, spec=spec, state=place.state, variable=variable))
        if variable is not None and place.state is not None:
            slot = Slot(optimizer=place.state.optimizer, variable=variable, name=place.slot, key=place.key)
            slots.append(slot)
    return ObjectGraph(
        nodes=tuple(nodes),
        edges=tuple(edges),
        slots=tuple(slots),
        leaves=tuple(leaves),
        structure=structure,
        left_out=sum(place.orphan for place in places.leaves),
    )


def _kind(spec: LeafSpec) -> NodeKind:
    kinds: dict[str, NodeKind] = {"array": "variable", "iterator": "iterator", "callable": "callable"}
    return kinds.get(spec.kind, "value")


class _Grower:
    """Containers as they stand in the graph: the interior of an optimizer is its states by class."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def grow(self, tree: Tree) -> _Box | int:
        if tree.path in self._places.optimizers and self._places.optimizers[tree.path] is tree:
            return self._optimizer(tree)
        if tree.is_leaf:
            return tree.leaf
        box = _Box(tree.path, "container", tree.cls)
        for name, child in tree.children.items():
            below = self.grow(child)
            if not name and isinstance(below, _Box) and below.kind == "container":
                box.children.update(below.children)  # the edges of a Checkpoint's root are its own
            else:
                box.children[name or ROOT] = below
        return box

    def _optimizer(self, tree: Tree) -> _Box:
        top = _Box(tree.path, "optimizer", tree.cls)
        for leaf in tree.all_leaves():
            path = self._places.leaves[leaf.leaf].path
            if path is None:
                continue
            box = top
            for depth in range(len(tree.path) + 1, len(path)):
                name = path[depth - 1]
                kind = self._places.types.get(path[:depth], "dict")
                child = box.children.setdefault(name, _Box(path[:depth], "container", kind))
                assert isinstance(child, _Box)  # a leaf has no edges: names of one state are unique
                box = child
            box.children[path[-1]] = leaf.leaf
        return top


def skip_orphans(specs: Sequence[LeafSpec], places: Places) -> list[LeafSpec]:
    """The specs of a save: slots whose variable is not in the tree are left out."""
    nothing = SkippedSpec()
    return [nothing if place.orphan else spec for spec, place in zip(specs, places.leaves, strict=True)]
