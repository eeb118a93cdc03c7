"""`ObjectGraph` to its documents. Pure, and nothing recurses: a tree may be of any depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from jaxckpt.graph.model import (
    ArraySpec,
    CallableSpec,
    IteratorSpec,
    LeafSpec,
    ObjectGraph,
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
    ShardingDoc,
    SkippedDoc,
    SpecDoc,
    StateDoc,
    StructureRow,
    ValueDoc,
    escape_text,
    plain_text,
    spelled_edges,
    spelled_nodes,
    spelled_slots,
    value_text,
)

Text = Callable[[str], str]


def to_documents(graph: ObjectGraph, stored: Callable[[tuple[int, ...]], bool]) -> list[GraphDoc]:
    """The documents of a graph and of its iterators' states; the graph's own comes first.

    Args:
        graph: the graph.
        stored: whether the value of the leaf at that path lies in the database.
    """
    waiting: list[tuple[tuple[int, ...], ObjectGraph]] = [((), graph)]
    documents: list[GraphDoc] = []
    while len(documents) < len(waiting):
        path, inner = waiting[len(documents)]
        known = len(waiting)
        try:
            documents.append(_document(inner, path, stored, waiting, plain_text))
        except UnicodeEncodeError:
            del waiting[known:]
            documents.append(_document(inner, path, stored, waiting, escape_text))
    return documents


def _document(
    graph: ObjectGraph,
    path: tuple[int, ...],
    stored: Callable[[tuple[int, ...]], bool],
    waiting: list[tuple[tuple[int, ...], ObjectGraph]],
    text: Text,
) -> GraphDoc:
    """One graph's document. Raises UnicodeEncodeError if a text has to be escaped and is not."""
    specs: dict[Any, int] = {}
    spec_docs: list[SpecDoc] = []
    states: dict[StateField, int] = {}
    leaves: list[tuple[str, int, int, int, str | None]] = []
    for index, leaf in enumerate(graph.leaves):
        spec = leaf.spec
        if isinstance(spec, IteratorSpec):
            number = -1 if spec.state is None else len(waiting)
            if spec.state is not None:
                waiting.append(((*path, index), spec.state))
            key: Any = ("iterator", number)
        elif isinstance(spec, ValueSpec):
            # By its text: 0.0 equals -0.0.
            key = ("value", spec.type, None if stored((*path, index)) else value_text(spec))
        else:
            key = spec
        at = specs.get(key)
        if at is None:
            at = specs[key] = len(spec_docs)
            spec_docs.append(_spec_document(spec, key, text))
        state = -1 if leaf.state is None else states.setdefault(leaf.state, len(states))
        leaves.append(
            (
                text(leaf.key),
                leaf.node,
                at,
                state,
                leaf.variable if leaf.variable is None else text(leaf.variable),
            )
        )
    plain = text is plain_text
    document = GraphDoc(
        nodes=graph.nodes if plain else spelled_nodes(graph.nodes, text),
        edges=graph.edges if plain else spelled_edges(graph.edges, text),
        slots=graph.slots if plain else spelled_slots(graph.slots, text),
        leaves=leaves,
        structure=_structure_rows(graph.structure, text),
        specs=spec_docs,
        states=[_state_document(state, text) for state in states],
        left_out=graph.left_out,
        escaped=not plain,
    )
    if plain:
        _check_text(document)
    return document


def _check_text(document: GraphDoc) -> None:
    """Raises UnicodeEncodeError where a text has a lone surrogate."""
    msgspec.json.encode(document)


def _spec_document(spec: LeafSpec, key: Any, text: Text) -> SpecDoc:
    match spec:
        case ArraySpec():
            sharding = spec.sharding
            return ArrayDoc(
                shape=list(spec.shape),
                dtype=spec.dtype,
                array_type=spec.array_type,
                weak_type=spec.weak_type,
                ref=spec.ref,
                impl=spec.impl,
                key_shape=list(spec.key_shape),
                sharding=None
                if sharding is None
                else ShardingDoc(
                    mesh=[(text(name), size) for name, size in sharding.mesh],
                    spec=[[text(axis) for axis in axes] for axes in sharding.spec],
                    shard_shape=list(sharding.shard_shape),
                    memory_kind=sharding.memory_kind,
                ),
            )
        case ValueSpec():
            value = key[2]
            return ValueDoc(type=spec.type, value=None if value is None else text(value))
        case IteratorSpec():
            return IteratorDoc(state=None if key[1] < 0 else key[1])
        case CallableSpec():
            return CallableDoc(name=text(spec.name))
        case SkippedSpec():
            return SkippedDoc()


def _state_document(state: StateField, text: Text) -> StateDoc:
    return StateDoc(
        optimizer=text(state.optimizer),
        state_class=text(state.state_class),
        ordinal=state.ordinal,
        field=text(state.field),
        labels=[text(label) for label in state.labels],
        path=[text(name) for name in state.path],
        suffix=[text(name) for name in state.suffix],
        is_slot=state.is_slot,
    )


def _structure_rows(root: Structure, text: Text) -> list[int | StructureRow]:
    rows: list[int | StructureRow] = []
    stack = [root]
    while stack:
        structure = stack.pop()
        if structure.type == "leaf":
            rows.append(structure.leaf)
            continue
        names = [
            (text(name.name), name.type)
            if name.text == name.name
            else (text(name.name), name.type, text(name.text))
            for name in structure.names
        ]
        rows.append((structure.type, text(structure.cls), structure.static, len(structure.children), names))
        stack.extend(reversed(structure.children))
    return rows
