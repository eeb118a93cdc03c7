"""Plain graphs for tests of the format: made without jax, from nested containers of specs."""

import math

from hypothesis import strategies as st

from jaxckpt.graph.model import (
    ArraySpec,
    CallableSpec,
    Edge,
    IteratorSpec,
    Leaf,
    Name,
    Node,
    ObjectGraph,
    Sharding,
    SkippedSpec,
    Slot,
    StateField,
    Structure,
    ValueSpec,
    escape,
    spell,
)

SPECS = (ArraySpec, ValueSpec, IteratorSpec, CallableSpec, SkippedSpec)
KINDS = {
    "array": "variable",
    "value": "value",
    "iterator": "iterator",
    "callable": "callable",
    "skipped": "value",
}


class Shared:
    """A leaf that is one node wherever it stands."""

    def __init__(self, spec):
        self.spec = spec


class Empty:
    """A custom node, or a namedtuple, without children."""

    def __init__(self, type_):
        self.type = type_


def make(tree, **more):
    """The graph of dicts, lists and tuples with specs as leaves. A slot is not made: see `with_slots`."""
    nodes, edges, leaves, shared = [], [], [], {}

    def node(key, kind, type_):
        nodes.append(Node(key=key, kind=kind, type=type_))
        return len(nodes) - 1

    def visit(value, path, parent, name):
        if isinstance(value, Shared):
            known = shared.get(id(value))
            at = shared[id(value)] = node(spell(path), "variable", "array") if known is None else known
            value = value.spec
        elif isinstance(value, SPECS):
            at = node(spell(path), KINDS[value.kind], str(value))
        else:
            at = node(spell(path), "container", type(value).__name__)
        if parent is not None:
            edges.append(Edge(parent=parent, name=name, child=at))
        if isinstance(value, SPECS):
            leaves.append(Leaf(key=spell(path), node=at, spec=value))
            return Structure(type="leaf", leaf=len(leaves) - 1)
        if value is None or isinstance(value, Empty):
            return (
                Structure(type="none")
                if value is None
                else Structure(type=value.type, cls="m:C", static=True)
            )
        if isinstance(value, dict):
            items, type_ = list(value.items()), "dict"
        else:
            items, type_ = list(enumerate(value)), type(value).__name__
        names, children = [], []
        for key, child in items:
            text = str(key)
            kind = "index" if type_ != "dict" else "int" if isinstance(key, int) else "str"
            names.append(Name(name=escape(text), type=kind, text=text))
            children.append(visit(child, (*path, escape(text)), at, escape(text)))
        return Structure(type=type_, names=tuple(names), children=tuple(children))

    structure = visit(tree, (), None, "")
    more = {"slots": (), **more}
    return ObjectGraph(
        nodes=tuple(nodes), edges=tuple(edges), leaves=tuple(leaves), structure=structure, **more
    )


def with_slots(graph):
    """Says of the last leaf that it is a slot of the first, if there are two."""
    if len(graph.leaves) < 2 or graph.leaves[-1].kind != "array":
        return graph
    first, last = graph.leaves[0], graph.leaves[-1]
    state = StateField(
        optimizer=graph.nodes[0].key,
        state_class="Adam",
        ordinal=1,
        field="mu",
        labels=("x",),
        path=("a", "b"),
        is_slot=True,
    )
    leaf = Leaf(key=last.key, node=last.node, spec=last.spec, state=state, variable=first.key)
    slot = Slot(optimizer=graph.nodes[0].key, variable=first.key, name="mu", key=last.key)
    return ObjectGraph(
        nodes=graph.nodes,
        edges=graph.edges,
        slots=(slot,),
        leaves=(*graph.leaves[:-1], leaf),
        structure=graph.structure,
        left_out=3,
    )


texts = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["a.b", "a/b", "\ud800", "\\", "\\ud800", "", "é"]
)
shardings = st.sampled_from(
    [
        None,
        Sharding(memory_kind="pinned_host"),
        Sharding(mesh=(("data", 2), ("mödel", 4)), spec=(("data",), (), ("mödel", "data")), shard_shape=()),
    ]
)
arrays = st.builds(
    ArraySpec,
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "uint4", "<U3", ">f4", "bool", "int64", "float6_e2m3fn"]),
    array_type=st.sampled_from(["jax", "numpy", "scalar"]),
    weak_type=st.booleans(),
    ref=st.booleans(),
    sharding=shardings,
)
keys = st.just(ArraySpec(shape=(2,), dtype="uint32", array_type="key", impl="threefry2x32", key_shape=(2,)))
values = st.one_of(
    st.builds(ValueSpec, type=st.just("int"), value=st.integers() | st.sampled_from([2**70, -(2**63)])),
    st.builds(ValueSpec, type=st.just("float"), value=st.floats()),
    st.builds(ValueSpec, type=st.just("complex"), value=st.complex_numbers()),
    st.builds(ValueSpec, type=st.just("bool"), value=st.booleans()),
    st.builds(ValueSpec, type=st.just("str"), value=texts),
    st.builds(ValueSpec, type=st.just("bytes"), value=st.binary(max_size=5)),
)
others = st.one_of(st.builds(CallableSpec, name=texts), st.just(SkippedSpec()), st.just(IteratorSpec()))
plain = arrays | keys | values | others


def trees(leaves):
    return st.recursive(
        leaves | st.none() | st.builds(Empty, st.sampled_from(["namedtuple", "object"])),
        lambda inner: (
            st.dictionaries(texts, inner, max_size=4)
            | st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
        ),
        max_leaves=8,
    )


states = trees(plain).map(make)
graphs = trees(plain | st.builds(IteratorSpec, state=states)).map(make).map(with_slots)


def same(a, b):
    """Whether two values are the same: type, sign of zero, NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
