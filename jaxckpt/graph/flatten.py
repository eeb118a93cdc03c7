"""Pytree to graph and leaves, and back."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax

from jaxckpt.errors import UnsupportedLeafError
from jaxckpt.graph.model import (
    ArraySpec,
    IteratorSpec,
    Leaf,
    LeafSpec,
    ObjectGraph,
    ValueSpec,
    join,
)
from jaxckpt.graph.pytree.leaves import Kind, classify_all, is_iterator, iterator_state
from jaxckpt.graph.pytree.nodes import build, skip_orphans
from jaxckpt.graph.pytree.signature import signature
from jaxckpt.graph.pytree.walk import child_names as child_names
from jaxckpt.graph.pytree.walk import walk
from jaxckpt.graph.slots import place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Structures whose names are remembered.
_MAX_GRAPHS = 32
#: Errors list this many leaves.
_MAX_LISTED = 10


class _Known(NamedTuple):
    """What is remembered of a structure; see `Flat`."""

    graph: ObjectGraph
    arrays: tuple[int, ...]
    shows: tuple[Callable[[Any], Any] | None, ...]
    nbytes: int
    nbytes_apart: int


#: By structure, kinds of leaves, and which leaves are one object. They hold no value.
_graphs: OrderedDict[object, _Known] = OrderedDict()


@dataclass(frozen=True)
class Flat:
    """A tree as a named graph and its leaves.

    Attributes:
        graph: the names, and what each leaf is.
        values: the leaves themselves, in the graph's order.
        treedef: JAX's description of the tree.
        arrays: indices of the leaves that are arrays, the first one of each node.
        shows: for each of those, see `leaves.Kind.show`.
        nbytes: of all of them.
        nbytes_apart: of those that are not shown in place, hence copied to be held.
        skeleton: the graph without the values of Python leaves and the states of iterators: the same object
            for two trees of one structure, as long as it is remembered; `graph` itself where it has neither.
        states: of a save, by index of its leaf: each iterator's state, flattened.
    """

    graph: ObjectGraph
    values: tuple[Any, ...]
    treedef: Any
    arrays: tuple[int, ...]
    shows: tuple[Callable[[Any], Any] | None, ...]
    nbytes: int
    nbytes_apart: int
    skeleton: ObjectGraph
    states: Mapping[int, Flat] = field(default_factory=dict[int, "Flat"])

    def unflatten(self, values: Sequence[object]) -> Any:
        """The tree with other leaves.

        Raises:
            ValueError: on another number of them.
        """
        if len(values) != len(self.values):
            raise ValueError(f"{len(values)} values for {len(self.values)} leaves")
        return jax.tree_util.tree_unflatten(self.treedef, values)


def flatten(tree: object, *, target: bool = False) -> Flat:
    """Names every leaf of a tree.

    What follows from the structure alone is remembered, so that a second call costs a look at each leaf.

    Args:
        tree: any pytree.
        target: whether it is what a restore fills, which may have abstract arrays, ``...`` and deleted
            arrays; its iterators are not asked for their state, and its optimizers may stand without
            their parameters. Otherwise it is what a save writes.

    Raises:
        UnsupportedLeafError: a leaf that cannot be saved, or names that cannot be told apart; it lists
            keys and remedies.
    """
    return _flatten(tree, target=target, prefix="", optimizers=True)


def object_graph(tree: object) -> ObjectGraph:
    """The named graph of a tree: what a checkpoint of it would look like.

    ``print(object_graph(tree))`` draws it.

    Raises:
        UnsupportedLeafError: as for `flatten`.
    """
    return flatten(tree, target=True).graph


def _flatten(tree: object, *, target: bool, prefix: str, optimizers: bool) -> Flat:
    try:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
    except Exception:  # of jax, or of a class in the tree: say at which key, if we can
        found = walk(tree, prefix).leaves
        _classify(found, tree, target=target, prefix=prefix, optimizers=optimizers)
        raise
    values: list[Any] = leaves
    kinds = _classify(values, tree, target=target, prefix=prefix, optimizers=optimizers)
    first = _shared(values, kinds)
    known = _graph(tree, treedef, kinds, first, target=target, prefix=prefix, optimizers=optimizers)
    graph = known.graph
    states: dict[int, Flat] = {}
    if any(kind.fill for kind in kinds):
        graph = _fill(graph, values, kinds, states, first, target=target, prefix=prefix)
    _, arrays, shows, nbytes, apart = known
    return Flat(graph, tuple(values), treedef, arrays, shows, nbytes, apart, known.graph, states)


def _classify(
    values: Sequence[object], tree: object, *, target: bool, prefix: str, optimizers: bool
) -> list[Kind]:
    kinds, failed = classify_all(values, target=target)
    if failed:
        walked = walk(tree, prefix)
        places = place(
            walked.structure, [kind.spec for kind in kinds], walked.of, optimizers=optimizers
        ).leaves
        lines = [f"{join(prefix, places[index].key)}: {reason}" for index, reason in failed.items()]
        if len(lines) > _MAX_LISTED:
            lines[_MAX_LISTED:] = [f"and {len(lines) - _MAX_LISTED} more"]
        raise UnsupportedLeafError("\n".join(lines))
    return kinds


def _shared(values: Sequence[object], kinds: Sequence[Kind]) -> dict[int, int]:
    """For each leaf whose object stands at an earlier position, that position."""
    if len(set(map(id, values))) == len(values):
        return {}
    seen: dict[int, int] = {}
    first: dict[int, int] = {}
    for index, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        if kind.shares:
            earlier = seen.setdefault(id(value), index)
            if earlier != index:
                first[index] = earlier
    return first


def _graph(
    tree: object,
    treedef: Any,
    kinds: Sequence[Kind],
    first: Mapping[int, int],
    *,
    target: bool,
    prefix: str,
    optimizers: bool,
) -> _Known:
    """The graph, without the values of Python leaves, and what else follows from it; remembered."""
    structure = signature(treedef)
    key = None
    if structure is not None:
        tokens = tuple(kind.token for kind in kinds)
        key = (structure, tokens, tuple(first.items()), target, optimizers)
        known = _graphs.get(key)
        if known is not None:
            # No lock, which a forked child might find taken for ever: another thread may have dropped it.
            with contextlib.suppress(KeyError):
                if len(_graphs) == _MAX_GRAPHS:  # else none is dropped next
                    _graphs.move_to_end(key)
            return known
    walked = walk(tree, prefix)
    if len(walked.leaves) != len(kinds):
        raise AssertionError(f"walked over {len(walked.leaves)} leaves where jax sees {len(kinds)}")
    specs: list[LeafSpec] = [kind.spec for kind in kinds]
    places = place(walked.structure, specs, walked.of, optimizers=optimizers)
    seen: set[str] = set()
    for each in places.leaves:
        if each.key in seen:
            raise UnsupportedLeafError(
                f"{join(prefix, each.key)}: two leaves have this key; rename one of them"
            )
        seen.add(each.key)
    if not target:
        specs = skip_orphans(specs, places)
        first = {leaf: other for leaf, other in first.items() if specs[leaf].kind == specs[other].kind}
    found = _known_of(build(walked.structure, places, specs, first), kinds)
    if key is not None:
        _graphs[key] = found
        with contextlib.suppress(KeyError):
            while len(_graphs) > _MAX_GRAPHS:
                _graphs.popitem(last=False)
    return found


def _known_of(graph: ObjectGraph, kinds: Sequence[Kind]) -> _Known:
    nodes: set[int] = set()
    arrays: list[int] = []
    for index, leaf in enumerate(graph.leaves):
        if isinstance(leaf.spec, ArraySpec) and leaf.node not in nodes:
            nodes.add(leaf.node)
            arrays.append(index)
    found = [kinds[index] for index in arrays]
    nbytes = sum(kind.nbytes for kind in found)
    apart = sum(kind.nbytes for kind in found if kind.show is None)
    return _Known(graph, tuple(arrays), tuple(kind.show for kind in found), nbytes, apart)


def _fill(
    graph: ObjectGraph,
    values: Sequence[object],
    kinds: Sequence[Kind],
    states: dict[int, Flat],
    first: Mapping[int, int],
    *,
    target: bool,
    prefix: str,
) -> ObjectGraph:
    """The graph with the values of Python leaves and, for a save, the states of iterators."""
    leaves = list(graph.leaves)
    for index, kind in enumerate(kinds):
        if not kind.fill:
            continue
        leaf = leaves[index]
        spec = leaf.spec
        if isinstance(spec, ValueSpec):
            spec = ValueSpec(type=spec.type, value=cast("Any", values[index]))
        elif isinstance(spec, IteratorSpec) and not target:
            states[index] = (
                states[first[index]] if index in first else _state(values[index], leaf.key, prefix)
            )
            spec = IteratorSpec(state=states[index].graph)
        leaves[index] = Leaf(
            key=leaf.key, node=leaf.node, spec=spec, state=leaf.state, variable=leaf.variable
        )
    return ObjectGraph(
        nodes=graph.nodes,
        edges=graph.edges,
        slots=graph.slots,
        leaves=tuple(leaves),
        structure=graph.structure,
        left_out=graph.left_out,
    )


def _state(iterator: object, key: str, prefix: str) -> Flat:
    """An iterator's state, asked for once.

    Its containers are taken apart here, so that a later change of one cannot reach the checkpoint; the
    arrays in it are copied with those of the tree.
    """
    assert is_iterator(iterator)
    where = join(prefix, key)
    flat = _flatten(iterator_state(iterator), target=False, prefix=where, optimizers=False)
    for leaf in flat.graph.leaves:
        if leaf.kind == "callable":  # no target has it to give back
            raise UnsupportedLeafError(
                f"{join(where, leaf.key)}: {leaf.spec} is in the state of an iterator, which has values "
                "only: let get_state give its name"
            )
    return flat
