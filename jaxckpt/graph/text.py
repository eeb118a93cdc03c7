"""A graph as text: a tree of edges, with the slots of each variable below it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxckpt.graph.model import Node, ObjectGraph


def draw(graph: ObjectGraph) -> str:
    """The graph as an indented tree.

    A slot stands below its variable, dotted, with the optimizer that keeps it; a node with several
    names is drawn in full at the first and referred to by its key at the others.
    """
    return "\n".join(_Drawing(graph).lines())


class _Drawing:
    def __init__(self, graph: ObjectGraph) -> None:
        self._graph = graph
        self._below: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for edge in graph.edges:
            self._below[edge.parent].append((edge.name, edge.child))
        nodes = {leaf.key: leaf.node for leaf in graph.leaves}
        self._slots: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for slot in graph.slots:
            label = f"{slot.optimizer}/{slot.name}"
            self._slots[nodes[slot.variable]].append((label, nodes[slot.key]))
        self._drawn: set[int] = set()

    def lines(self) -> Iterator[str]:
        if self._graph.nodes:
            yield _label(self._graph.nodes[0])
            yield from self._children(0, "")
        if self._graph.left_out:
            yield f"{self._graph.left_out} slots left out: their variables are not in this tree"

    def _children(self, parent: int, indent: str) -> Iterator[str]:
        self._drawn.add(parent)
        plain = [(name, child, False) for name, child in self._below[parent]]
        rows = plain + [(name, child, True) for name, child in self._slots[parent]]
        for position, (name, child, dotted) in enumerate(rows):
            last = position == len(rows) - 1
            branch = ("└" if last else "├") + ("┄ " if dotted else "─ ")
            node = self._graph.nodes[child]
            again = child in self._drawn and not dotted
            yield f"{indent}{branch}{name}: {'= ' + node.key if again else _label(node)}"
            if not dotted and not again:
                yield from self._children(child, indent + ("   " if last else "│  "))


def _label(node: Node) -> str:
    return "optimizer" if node.kind == "optimizer" else node.type
