"""Documents to `ObjectGraph`, with every check that they allow. Pure.

Nothing here recurses, and no step takes more than time in proportion to the document: a hostile one can only
be refused.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from jaxckpt.graph.model import (
    ArraySpec,
    CallableSpec,
    IteratorSpec,
    KeyType,
    Leaf,
    LeafSpec,
    Name,
    ObjectGraph,
    Sharding,
    SkippedSpec,
    StateField,
    Structure,
    ValueSpec,
)
from jaxckpt.storage.format.documents import (
    ArrayDoc,
    CallableDoc,
    GraphDoc,
    IteratorDoc,
    SkippedDoc,
    SpecDoc,
    StateDoc,
    StructureRow,
    ValueDoc,
    plain_text,
    spelled_edges,
    spelled_nodes,
    spelled_slots,
    text_value,
    unescape_text,
)

#: Deeper trees are refused.
MAX_DEPTH = 10_000
#: So many iterators' states may lie in one another.
MAX_STATES = 64
_MAX_RANK = 64  # numpy's
_KEY_TYPES = frozenset(get_args(KeyType))

Text = Callable[[str], str]
Problems = list[str]


@dataclass(slots=True, kw_only=True)
class _Graphs:
    """The graphs read so far: states come after what holds them, and are read before it.

    Attributes:
        graphs: those that have been read.
        used: whether a leaf has it as its state.
        heights: how many states lie in one another below it.
    """

    graphs: list[ObjectGraph | None]
    used: list[bool]
    heights: list[int]

    def state(self, holder: int, number: int, where: str, problems: Problems) -> IteratorSpec:
        """The state of an iterator in the graph `holder`."""
        if not holder < number < len(self.graphs) or self.used[number]:
            problems.append(f"{where}.state: points at no state, or at one that is another's")
            return IteratorSpec()
        self.used[number] = True
        self.heights[holder] = max(self.heights[holder], self.heights[number] + 1)
        if self.heights[holder] > MAX_STATES:
            problems.append(f"{where}.state: more than {MAX_STATES} states lie in one another")
        return IteratorSpec(state=self.graphs[number])


def from_documents(documents: Sequence[GraphDoc], problems: Problems) -> ObjectGraph | None:
    """The graph of its documents.

    Args:
        documents: as `to_documents` makes them.
        problems: gets one text, with its place in the document, for each thing that is wrong.

    Returns:
        The graph; None, or a graph that must not be used, if there are problems.
    """
    if not documents:
        problems.append("graphs: there is none")
        return None
    known = _Graphs(
        graphs=[None] * len(documents), used=[False] * len(documents), heights=[0] * len(documents)
    )
    # States come after the graphs that hold them, so that no graph can hold itself.
    for number in range(len(documents) - 1, -1, -1):
        where = "graph" if number == 0 else f"graphs[{number}]"
        known.graphs[number] = _graph(documents[number], number, known, where, problems)
    unused = [number for number in range(1, len(documents)) if not known.used[number]]
    if unused:
        problems.append(f"graphs[{unused[0]}]: no leaf has this state")
    return known.graphs[0]


def _graph(
    document: GraphDoc,
    number: int,
    known: _Graphs,
    where: str,
    problems: Problems,
) -> ObjectGraph | None:
    text = unescape_text if document.escaped else plain_text
    start = len(problems)
    specs = [
        _spec(spec, number, known, text, f"{where}.specs[{i}]", problems)
        for i, spec in enumerate(document.specs)
    ]
    states: list[StateField | None] = [_state(state, text) for state in document.states]
    columns: list[Any] = list(zip(*document.leaves, strict=True)) or [()] * 5
    _check_leaves(document, columns, where, problems)
    _check_edges(document, where, problems)
    if len(problems) > start:
        return None
    structure = _structure(document, len(document.leaves), text, where, problems)
    if structure is None:
        return None
    keys, nodes, spec_rows, state_rows, variables = columns
    states.append(None)  # row -1
    edges, slots, all_nodes = document.edges, document.slots, document.nodes
    if document.escaped:
        keys = list(map(text, keys))
        variables = [variable if variable is None else text(variable) for variable in variables]
        all_nodes = spelled_nodes(all_nodes, text)
        edges, slots = spelled_edges(edges, text), spelled_slots(slots, text)
    leaves = [
        Leaf(key=key, node=node, spec=specs[spec], state=states[state], variable=variable)
        for key, node, spec, state, variable in zip(
            keys, nodes, spec_rows, state_rows, variables, strict=True
        )
    ]
    return ObjectGraph(
        nodes=all_nodes,
        edges=edges,
        slots=slots,
        leaves=tuple(leaves),
        structure=structure,
        left_out=document.left_out,
    )


def _check_leaves(document: GraphDoc, columns: Sequence[Any], where: str, problems: Problems) -> None:
    """That all numbers of the leaves and slots point at something, and that no key stands twice."""
    nodes, specs, states = len(document.nodes), len(document.specs), len(document.states)
    if not nodes:
        problems.append(f"{where}.nodes: there is none")
    bounds = ((columns[1], 0, nodes), (columns[2], 0, specs), (columns[3], -1, states))
    if not all(_within(*each) for each in bounds):
        for i, (_, node, spec, state, _) in enumerate(document.leaves):
            if not (0 <= node < nodes and 0 <= spec < specs and -1 <= state < states):
                problems.append(f"{where}.leaves[{i}]: points at a node, spec or state that is not there")
    keys = set(columns[0])
    if len(keys) != len(document.leaves):
        twice = [key for key, number in Counter(columns[0]).items() if number > 1]
        problems.append(f"{where}.leaves: several have the key {twice[0]!r}")
    node_keys = {node.key for node in document.nodes} if document.slots else set[str]()
    for i, slot in enumerate(document.slots):
        if slot.optimizer not in node_keys or slot.variable not in keys or slot.key not in keys:
            problems.append(f"{where}.slots[{i}]: its optimizer, variable or value is not there")
    if document.left_out < 0:
        problems.append(f"{where}.left_out: is negative")


def _within(numbers: Sequence[int], low: int, stop: int) -> bool:
    return not numbers or (min(numbers) >= low and max(numbers) < stop)


def _check_edges(document: GraphDoc, where: str, problems: Problems) -> None:
    """That all edges join nodes that are there, and that there is no cycle."""
    nodes = len(document.nodes)
    parents = [edge.parent for edge in document.edges]
    children = [edge.child for edge in document.edges]
    if _within(parents, 0, nodes) and _within(children, 0, nodes):
        if not all(map(operator.lt, parents, children)) and _has_cycle(nodes, parents, children):
            problems.append(f"{where}.edges: go round in a circle")
        return
    for i, (a, b) in enumerate(zip(parents, children, strict=True)):
        if not (0 <= a < nodes and 0 <= b < nodes):
            problems.append(f"{where}.edges[{i}]: joins nodes that are not there")


def _has_cycle(nodes: int, parents: Sequence[int], children: Sequence[int]) -> bool:
    """Kahn: takes away nodes that nothing points at until none is left, or only cycles are."""
    incoming = [0] * nodes
    below: list[list[int]] = [[] for _ in range(nodes)]
    for parent, child in zip(parents, children, strict=True):
        incoming[child] += 1
        below[parent].append(child)
    free = [node for node in range(nodes) if not incoming[node]]
    for node in free:
        for child in below[node]:
            incoming[child] -= 1
            if not incoming[child]:
                free.append(child)  # the list is the queue
    return len(free) != nodes


def _spec(
    document: SpecDoc,
    number: int,
    known: _Graphs,
    text: Text,
    where: str,
    problems: Problems,
) -> LeafSpec:
    match document:
        case ArrayDoc():
            return _array(document, text, where, problems)
        case ValueDoc():
            return _value(document, text, where, problems)
        case IteratorDoc():
            if document.state is None:
                return IteratorSpec()
            return known.state(number, document.state, where, problems)
        case CallableDoc():
            return CallableSpec(name=text(document.name))
        case SkippedDoc():
            return SkippedSpec()


def _value(document: ValueDoc, text: Text, where: str, problems: Problems) -> ValueSpec:
    if document.value is None:
        if document.type not in ("str", "bytes"):
            problems.append(f"{where}: a Python {document.type} without a value")
        return ValueSpec(type=document.type)
    try:
        return ValueSpec(type=document.type, value=text_value(document.type, text(document.value)))
    except (ValueError, OverflowError) as error:
        problems.append(f"{where}.value: {document.value[:40]!r} is no {document.type} ({error})")
        return ValueSpec(type=document.type)


def _array(document: ArrayDoc, text: Text, where: str, problems: Problems) -> ArraySpec:
    lengths = [*document.shape, *document.key_shape]
    if len(lengths) > _MAX_RANK or any(not 0 <= length < 1 << 62 for length in lengths):
        problems.append(f"{where}.shape: {lengths[:8]} is no shape")
    elif math.prod(max(1, length) for length in lengths) >= 1 << 62:
        problems.append(f"{where}.shape: {lengths[:8]} has more elements than any array")
    sharding = document.sharding
    if sharding is not None and len(sharding.shard_shape) not in (0, len(document.shape)):
        problems.append(f"{where}.sharding: its shard has another rank than the array")
    if (document.impl is None) != (document.array_type != "key"):
        problems.append(f"{where}.impl: only keys have one")
    return ArraySpec(
        shape=tuple(document.shape),
        dtype=document.dtype,
        array_type=document.array_type,
        weak_type=document.weak_type,
        ref=document.ref,
        impl=document.impl,
        key_shape=tuple(document.key_shape),
        sharding=None
        if sharding is None
        else Sharding(
            mesh=tuple((text(name), size) for name, size in sharding.mesh),
            spec=tuple(tuple(text(axis) for axis in axes) for axes in sharding.spec),
            shard_shape=tuple(sharding.shard_shape),
            memory_kind=sharding.memory_kind,
        ),
    )


def _state(document: StateDoc, text: Text) -> StateField:
    return StateField(
        optimizer=text(document.optimizer),
        state_class=text(document.state_class),
        ordinal=document.ordinal,
        field=text(document.field),
        labels=tuple(map(text, document.labels)),
        path=tuple(map(text, document.path)),
        suffix=tuple(map(text, document.suffix)),
        is_slot=document.is_slot,
    )


def _structure(
    document: GraphDoc, leaves: int, text: Text, where: str, problems: Problems
) -> Structure | None:
    """Builds the tree bottom up from its preorder: from the last row back, children stand on the stack."""
    rows = document.structure
    order = [row for row in rows if type(row) is int]
    if order != list(range(leaves)):
        problems.append(f"{where}.structure: does not hold each of the {leaves} leaves once, in order")
        return None
    known: dict[tuple[str, ...], Name] = {}
    stack: list[Structure] = []
    heights: list[int] = []
    for i in range(len(rows) - 1, -1, -1):
        row = rows[i]
        if isinstance(row, int):
            stack.append(Structure(type="leaf", leaf=row))
            heights.append(0)
            continue
        count, start = row[3], len(stack) - row[3]
        structure = _container(row, stack[start:], text, known) if 0 <= count <= len(stack) else None
        height = 1 + max(heights[start:], default=0) if count else 0
        if structure is None or height > MAX_DEPTH:
            what = f"deeper than {MAX_DEPTH} levels" if structure else "its names and children do not fit"
            problems.append(f"{where}.structure[{i}]: {what}")
            return None
        stack[start:], heights[start:] = [structure], [height]
    if len(stack) != 1:
        problems.append(f"{where}.structure: is not one tree")
        return None
    return stack[0]


def _container(
    row: StructureRow, children: list[Structure], text: Text, known: dict[tuple[str, ...], Name]
) -> Structure | None:
    """A container of its children, which come last first; None if they do not fit its names."""
    type_, cls, static, count, rows = row
    if type_ == "leaf" or (type_ == "none" and count) or len(rows) != count:
        return None
    names: list[Name] = []
    for parts in rows:
        name = known.get(parts)
        if name is None:
            if len(parts) not in (2, 3) or parts[1] not in _KEY_TYPES:
                return None
            type_name: Any = parts[1]
            name = known[parts] = Name(
                name=text(parts[0]), type=type_name, text=text(parts[-1 if len(parts) == 3 else 0])
            )
        names.append(name)
    children.reverse()
    return Structure(type=type_, cls=text(cls), static=static, names=tuple(names), children=tuple(children))
