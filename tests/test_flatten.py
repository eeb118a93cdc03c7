from __future__ import annotations

import dataclasses
import datetime
import enum
import fractions
import gc
import io
import pathlib
import random
import time
import weakref
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.errors import UnsupportedLeafError
from jaxckpt.graph import flatten as module
from jaxckpt.graph.flatten import child_names, flatten, object_graph
from jaxckpt.graph.marks import Optimizer, PerProcess, Values
from jaxckpt.graph.model import ArraySpec, IteratorSpec, Sharding, SkippedSpec, ValueSpec

KINDS = trees.kinds()


def keys(tree, **options):
    return [leaf.key for leaf in flatten(tree, **options).graph.leaves]


def spec(leaf, **options):
    return flatten(leaf, **options).graph.leaves[0].spec


def test_there_are_many_kinds():
    assert len(KINDS) >= 60


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_flattens_and_unflattens(name, target):
    tree = KINDS[name]()
    flat = flatten(tree, target=target)
    leaves, treedef = jax.tree.flatten(tree)
    assert len(flat.values) == len(leaves)
    assert all(a is b for a, b in zip(flat.values, leaves, strict=True))
    assert flat.treedef == treedef
    again, other = jax.tree.flatten(flat.unflatten(flat.values))
    assert other == treedef
    assert all(a is b for a, b in zip(again, leaves, strict=True))
    graph = flat.graph
    assert len(graph.by_key) == len(graph.leaves) == len(leaves)
    consistent(graph)


def consistent(graph):
    """What holds of every graph."""
    positions = [s.leaf for _, s in graph.walk() if s.type == "leaf"]
    assert positions == list(range(len(graph.leaves)))
    assert all(0 <= leaf.node < len(graph.nodes) for leaf in graph.leaves)
    reached = {edge.child for edge in graph.edges} | {0}
    for index, node in enumerate(graph.nodes):
        assert (index in reached) == (node.kind != "slot")
    assert [edge.parent for edge in graph.edges] == sorted(edge.parent for edge in graph.edges)
    for slot in graph.slots:
        assert slot.key == graph.leaves[graph.by_key[slot.key]].key
        assert slot.key.startswith(slot.variable + "/.OPTIMIZER_SLOT") or slot.variable == "."
        assert graph.by_key[slot.variable] is not None
        assert graph.leaves[graph.by_key[slot.key]].variable == slot.variable
    assert str(graph)


@pytest.mark.parametrize("name", KINDS)
def test_a_second_flatten_finds_the_same(name):
    # With the cache, without it, and of an equal tree made anew.
    first = flatten(KINDS[name](), target=True).graph
    assert repr(flatten(KINDS[name](), target=True).graph) == repr(first)
    module._graphs.clear()
    assert repr(flatten(KINDS[name](), target=True).graph) == repr(first)


# ---- keys ----


def test_keys_are_escaped():
    assert keys({"": 1, "a.b": 2, "a/b": 3, "d": {"": 4}}) == [".E", "a..b", "a.Sb", "d/.E"]
    assert keys(5) == ["."]
    assert keys(nn.Partitioned(jnp.ones(2), ("x",))) == ["."]


def test_an_integer_beside_a_string_of_its_spelling():
    assert keys(OrderedDict([("1", 1), (1, 2), (2, 3)])) == ["1", ".N1", "2"]
    assert keys({1: 1, 2: 2}) == ["1", "2"]
    assert keys(OrderedDict([(".N1", 1), (1, 2), ("1", 3)])) == ["..N1", ".N1", "1"]


def test_other_names_that_look_alike_raise():
    for pair in (
        [(1.5, 1), ("1.5", 2)],
        [(None, 1), ("None", 2)],
        [(True, 1), ("True", 2)],
        [((1, 2), 1), ("(1, 2)", 2)],
    ):
        with pytest.raises(UnsupportedLeafError, match=r"a/.*two keys of one container"):
            flatten({"a": OrderedDict(pair)})


def test_a_dict_that_cannot_be_sorted():
    with pytest.raises(UnsupportedLeafError, match=r"^a/b: a dict whose keys jax cannot sort \(int, str\)"):
        flatten({"a": {"b": {1: 1, "x": 2}}})


def test_typed_names():
    graph = flatten(OrderedDict([("s", 1), (1, 1), (2.5, 1), (None, 1), (b"b", 1), ((1,), 1)])).graph
    assert [name.type for name in graph.structure.names] == ["str", "int", "float", "none", "bytes", "repr"]
    assert [name.type for name in flatten([1, (2,)]).graph.structure.names] == ["index", "index"]
    assert [name.text for name in flatten(trees.Point(1, 2)).graph.structure.names] == ["x", "y"]


def test_equal_keys_of_other_types_are_not_confused():
    # 1, 1.0 and True are equal, and so are JAX's descriptions of such dicts.
    assert keys({1: 1}) == ["1"]
    assert keys({True: 1}) == ["True"]
    assert keys({1.0: 1}) == ["1..0"]
    assert keys({1: 1}) == ["1"]


class Colour(str, enum.Enum):  # noqa: UP042  # prints as Colour.RED
    RED = "red"


def test_enum_keys_are_the_strings_that_they_are():
    assert keys({Colour.RED: 1}) == ["red"]
    assert keys({np.int64(3): 1}) == ["3"]


def test_boxes_and_marks_have_no_name():
    box = nn.Partitioned(jnp.ones(2), ("x",))
    assert keys({"a": box, "b": nn.LogicallyPartitioned(jnp.ones(2), ("y",))}) == ["a", "b"]
    assert keys({"a": Values({"b": 1}), "c": PerProcess(2), "d": Optimizer({"e": 1})}) == [
        "a/b",
        "c",
        "d/dict/e",
    ]
    assert keys({"v": {"value": 1}, "d": trees.Point({"value": 1}, 2)}) == ["d/x/value", "d/y", "v/value"]


def test_nnx_variables_drop_their_value_edge():
    assert keys(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == ["bias", "kernel"]
    assert keys({"m": nnx.Linear(2, 3, rngs=nnx.Rngs(0))}, target=True)[-1] == "m/kernel"


def test_keys_do_not_depend_on_boxes():
    plain = trees.with_optimizer(optax.adam(0.1))
    del plain["step"]
    assert keys(trees.boxed()) == keys(plain)


# ---- leaves ----


def test_specs_of_arrays():
    assert spec(jnp.ones((2, 3), jnp.bfloat16)) == ArraySpec(shape=(2, 3), dtype="bfloat16")
    assert spec(jnp.asarray(2.0)).weak_type
    assert spec(np.arange(3, dtype=">i2")) == ArraySpec(shape=(3,), dtype=">i2", array_type="numpy")
    assert spec(np.array(["abc"])).dtype == "<U3"
    assert spec(np.array(["2020"], "M8[D]")).dtype == "<M8[D]"
    assert spec(np.float32(1)) == ArraySpec(shape=(), dtype="float32", array_type="scalar")
    assert spec(jnp.ones(2, jnp.int4)).dtype == "int4"
    assert spec(jax.new_ref(jnp.ones(2))) == ArraySpec(shape=(2,), dtype="float32", ref=True)


@pytest.mark.parametrize(("impl", "words"), [("threefry2x32", 2), ("rbg", 4), ("unsafe_rbg", 4)])
def test_specs_of_keys(impl, words):
    wanted = ArraySpec(shape=(3,), dtype="uint32", array_type="key", impl=impl, key_shape=(words,))
    found = jax.random.split(jax.random.key(0, impl=impl), 3)
    assert spec(found) == wanted
    abstract = jax.ShapeDtypeStruct(found.shape, found.dtype)
    assert spec(abstract, target=True) == dataclasses.replace(wanted, abstract=True)


def test_specs_of_python_values():
    for value in (3, 10**40, 0.5, 1j, True, "s", b"b"):
        assert spec(value) == ValueSpec(type=type(value).__name__, value=value)


def test_shardings():
    mesh = jax.make_mesh((1, 1), ("x", "y"))
    sharding = jax.NamedSharding(mesh, jax.P(("x", "y")))
    found = spec(jax.device_put(jnp.ones((4, 2)), sharding)).sharding
    assert found == Sharding(
        mesh=(("x", 1), ("y", 1)), spec=(("x", "y"), ()), shard_shape=(4, 2), memory_kind=found.memory_kind
    )
    assert spec(jax.ShapeDtypeStruct((4, 2), "float32", sharding=sharding), target=True).sharding is not None
    assert spec(jnp.ones(2)).sharding is None


def test_memmap_is_an_array(tmp_path):
    array = np.memmap(tmp_path / "m", np.float32, "w+", shape=(2,))
    assert spec(array) == ArraySpec(shape=(2,), dtype="float32", array_type="numpy")


class Number(int):
    pass


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Unregistered:
    x: int = 1


class Plain:
    pass


class MyDict(dict):
    pass


UNSAVABLE = {
    "set": ({1}, "sorted list"),
    "generator": ((i for i in ()), "get_state"),
    "builtin iterator": (iter([1]), "get_state"),
    "file": (io.StringIO(), "open it again"),
    "random generator": (np.random.default_rng(0), "bit_generator.state"),
    "random": (random.Random(0), "getstate"),
    "object array": (np.array([{}], object), "object array"),
    "masked array": (np.ma.masked_array([1], [True]), "filled"),
    "structured array": (np.zeros(2, [("a", "f4")]), "separate arrays"),
    "structured scalar": (np.zeros(2, [("a", "f4")])[0], "separate arrays"),
    "raw void": (np.zeros(2, "V3"), "structured"),
    "record array": (np.rec.array([(1,)], dtype=[("a", "i4")]), "subclass"),
    "longdouble": (np.ones(1, np.longdouble), "float64"),
    "int subclass": (Number(3), "type would be lost"),
    "enum": (Level.LOW, ".value"),
    "bytearray": (bytearray(b"x"), "bytes"),
    "range": (range(3), "list"),
    "date": (datetime.date(2020, 1, 1), "isoformat"),
    "fraction": (fractions.Fraction(1, 2), "str"),
    "path": (pathlib.PurePosixPath("a"), "str"),
    "dataclass": (Unregistered(), "register_dataclass"),
    "object": (Plain(), "pytree"),
    "dict subclass": (MyDict(), "pytree"),
    "strings of any width": (np.array(["a"], np.dtypes.StringDType()), "astype"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_cannot_be_saved_says_where_and_what_to_do(name):
    leaf, remedy = UNSAVABLE[name]
    for target in (False, True):
        with pytest.raises(UnsupportedLeafError) as caught:
            flatten({"a": [1, {"b/c": leaf}]}, target=target)
        assert str(caught.value).startswith("a/1/b.Sc: ")
        assert remedy in str(caught.value)


def test_every_bad_leaf_is_listed():
    with pytest.raises(UnsupportedLeafError) as caught:
        flatten({"a": {1}, "b": 1, "c": [range(2)] * 20})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("a: ")
    assert lines[1].startswith("c/0: ")
    assert lines[-1] == "and 11 more"


def test_a_bad_leaf_inside_an_optimizer_has_its_key():
    state = optax.scale_by_adam().init({"w": jnp.ones(2)})._replace(count={1})
    with pytest.raises(UnsupportedLeafError, match=r"^opt/ScaleByAdamState/count: "):
        flatten({"opt": state})


def test_what_has_no_value_is_welcome_in_a_target_only():
    struct = jax.ShapeDtypeStruct((2,), "float32")
    gone = jnp.ones(2)
    gone.delete()
    for leaf, wanted in ((struct, "abstract"), (..., "not asked for"), (gone, "deleted")):
        with pytest.raises(UnsupportedLeafError, match=f"^x: .*{wanted}"):
            flatten({"x": leaf})
    graph = flatten({"a": struct, "b": ..., "c": gone}, target=True).graph
    assert [leaf.spec for leaf in graph.leaves] == [
        ArraySpec(shape=(2,), dtype="float32", abstract=True),
        SkippedSpec(),
        ArraySpec(shape=(2,), dtype="float32"),
    ]


def test_tracers():
    @jax.jit
    def f(x):
        flatten({"x": x})
        return x

    with pytest.raises(UnsupportedLeafError, match=r"^x: a tracer .*outside"):
        f(1.0)


def test_callables():
    graph = flatten({"f": jnp.tanh, "g": jax.jit(test_tracers), "h": Plain, "i": lambda: 1}).graph
    assert [leaf.kind for leaf in graph.leaves] == ["callable"] * 4
    assert all("0x" not in leaf.spec.name for leaf in graph.leaves)
    assert graph.leaves[1].spec.name.endswith("test_tracers")


# ---- iterators ----


def test_an_iterator_is_asked_once():
    it = trees.Counting(3)
    flat = flatten({"a": it, "b": {"c": it}, "d": trees.Loader()})
    assert it.asked == 1
    assert [leaf.kind for leaf in flat.graph.leaves] == ["iterator"] * 3
    assert flat.graph.leaves[0].node == flat.graph.leaves[1].node
    assert flat.states[0] is flat.states[1]
    state = flat.graph.leaves[0].spec.state
    assert [leaf.key for leaf in state.leaves] == ["buffer", "position"]
    assert flat.states[0].values[1] == 3
    assert flatten({"a": it}, target=True).graph.leaves[0].spec == IteratorSpec(state=None)
    assert it.asked == 1


def test_an_iterators_state_is_taken_apart():
    it = trees.Counting()
    it.recent = [1, 2]
    flat = flatten(it)
    it.recent.append(3)
    assert flat.states[0].unflatten(flat.states[0].values)["recent"] == [1, 2]


def test_an_iterators_state_names_the_whole_key():
    it = trees.Counting()
    it.recent = [{1}]
    with pytest.raises(UnsupportedLeafError, match=r"^data/recent/0: a set"):
        flatten({"data": it})


def test_no_iterator_is_asked_when_something_else_is_wrong():
    it = trees.Counting()
    with pytest.raises(UnsupportedLeafError):
        flatten({"a": it, "b": {1}})
    assert it.asked == 0


def test_a_pytree_with_get_state_is_a_container():
    @jax.tree_util.register_pytree_node_class
    class Both(trees.Counting):
        def tree_flatten(self):
            return (self.position,), None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls(*children)

    assert keys(Both(3)) == ["0"]


# ---- sharing ----


def test_a_shared_array_is_one_node():
    tree = trees.shared()
    graph = flatten(tree).graph
    first, second = graph.leaves
    assert (first.key, second.key, first.node) == ("embed", "head/kernel", second.node)
    assert graph.nodes[first.node].key == "embed"
    assert sum(edge.child == first.node for edge in graph.edges) == 2


def test_the_shortest_key_names_the_node():
    x = jnp.ones(2)
    graph = flatten({"a": {"b": x}, "c": x, "d": x}).graph
    assert graph.nodes[graph.leaves[0].node].key == "c"


def test_what_is_shared():
    array, ref = np.ones(2), jax.new_ref(jnp.ones(2))
    number, struct, word = 12345678, jax.ShapeDtypeStruct((2,), "float32"), "word"
    graph = flatten(
        {"a": [array, ref, number, struct, word], "b": [array, ref, number, struct, word]}, target=True
    ).graph
    pairs = zip(graph.leaves[:5], graph.leaves[5:], strict=True)
    assert [a.node == b.node for a, b in pairs] == [True, True, False, False, False]


def test_the_cache_tells_patterns_of_sharing_apart():
    x, y = jnp.ones(2), jnp.ones(2)
    for _ in range(2):
        for a, b, c in ((x, y, jnp.ones(2)), (x, x, y), (x, y, x), (x, y, y), (x, x, x)):
            nodes = [leaf.node for leaf in flatten({"a": a, "b": b, "c": c}).graph.leaves]
            assert [nodes[0] == nodes[1], nodes[0] == nodes[2], nodes[1] == nodes[2]] == [
                a is b,
                a is c,
                b is c,
            ]


# ---- the cache ----


def test_python_values_are_not_remembered():
    assert [flatten({"a": n}).graph.leaves[0].spec.value for n in (1, 2)] == [1, 2]
    assert flatten({"a": True}).graph.leaves[0].spec == ValueSpec(type="bool", value=True)
    assert flatten({"a": 1}).graph.leaves[0].spec == ValueSpec(type="int", value=1)
    assert flatten({"a": 1.0}).graph.leaves[0].spec == ValueSpec(type="float", value=1.0)


def test_a_known_structure_gives_the_very_graph():
    assert flatten(trees.shared()).graph is flatten(trees.shared()).graph
    assert flatten({"a": np.ones(2)}).graph is not flatten({"a": np.ones(3)}).graph


def test_the_cache_is_bounded_and_keeps_nothing_alive():
    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    array = np.ones(3)
    array_gone = weakref.ref(array)

    def update(*_, captured=big):
        return captured

    state = trees.train_state().replace(tx=optax.GradientTransformation(update, update))
    for _ in range(2):
        flatten({"s": state, "x": array}, target=True)
    del state, update, big, array
    gc.collect()
    assert gone() is None
    assert array_gone() is None
    for i in range(100):
        flatten({f"k{i}": 1})
    assert len(module._graphs) <= module._MAX_GRAPHS


def test_a_second_call_is_cheap():
    net = {f"l{i}": {"w": jnp.ones(3), "b": jnp.ones(2)} for i in range(833)}
    state = {"net": net, "opt": optax.adam(0.1).init(net)}
    flatten(state)
    best = min(timed(state) for _ in range(10))
    assert best < 0.05  # 12 ms on a quiet machine


def timed(state):
    start = time.perf_counter()
    flatten(state)
    return time.perf_counter() - start


def test_opaque_structures_are_cached_too():
    state = trees.train_state().replace(step=jnp.int32(0))
    flatten(state)
    assert flatten(state).graph is flatten(jax.tree.map(lambda x: x + 0, state)).graph


# ---- the graph ----


def test_the_graph_of_the_guide():
    graph = object_graph(trees.guide())
    kind = {node.key: node.kind for node in graph.nodes}
    assert kind == {
        ".": "container",
        "iterator": "iterator",
        "net": "container",
        "net/l1": "container",
        "net/l1/bias": "variable",
        "net/l1/kernel": "variable",
        "net/l1/bias/.OPTIMIZER_SLOT/optimizer/mu": "slot",
        "net/l1/bias/.OPTIMIZER_SLOT/optimizer/nu": "slot",
        "net/l1/kernel/.OPTIMIZER_SLOT/optimizer/mu": "slot",
        "net/l1/kernel/.OPTIMIZER_SLOT/optimizer/nu": "slot",
        "optimizer": "optimizer",
        "optimizer/ScaleByAdamState": "container",
        "optimizer/ScaleByAdamState/count": "variable",
        "step": "value",
    }
    names = {(graph.nodes[edge.parent].key, edge.name, graph.nodes[edge.child].key) for edge in graph.edges}
    assert ("optimizer", "ScaleByAdamState", "optimizer/ScaleByAdamState") in names
    assert ("optimizer/ScaleByAdamState", "count", "optimizer/ScaleByAdamState/count") in names
    assert {(slot.optimizer, slot.variable, slot.name) for slot in graph.slots} == {
        ("optimizer", f"net/l1/{variable}", name) for variable in ("kernel", "bias") for name in ("mu", "nu")
    }


def test_the_graph_prints_as_a_tree():
    assert str(object_graph(trees.guide())).splitlines()[:8] == [
        "dict",
        "├─ iterator: an iterator's state",
        "├─ net: dict",
        "│  └─ l1: dict",
        "│     ├─ bias: float32[5]",
        "│     │  ├┄ optimizer/mu: float32[5]",
        "│     │  └┄ optimizer/nu: float32[5]",
        "│     └─ kernel: float32[1, 5]",
    ]
    assert "left out" in str(object_graph({"opt": optax.adam(0.1).init(trees.params())}))


def test_child_names():
    assert child_names({"b": 1, "a": 2}) == ("a", "b")
    assert child_names(trees.Point(1, 2)) == ("x", "y")
    assert child_names([1, 2]) == ("0", "1")
    assert child_names(Values({"a": 1})) == ("a",)
    assert child_names(3) == ()


# ---- properties ----

NAMES = st.one_of(st.text(max_size=3), st.sampled_from(["", ".", "..", "/", ".S", "a.b", ".N1", "1"]))
LEAVES = st.one_of(
    st.integers(), st.floats(), st.text(max_size=3), st.booleans(), st.none(),
    st.integers(0, 3).map(lambda n: np.zeros(n)), st.integers(0, 3).map(lambda n: jnp.zeros(n)),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=4),
        st.dictionaries(st.one_of(NAMES, st.integers(0, 2)), inner, max_size=4).map(OrderedDict),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.tuples(inner, inner).map(lambda pair: trees.Point(*pair)),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_flattening_is_reversed_and_keys_are_unique(tree):
    flat = flatten(tree)
    leaves, treedef = jax.tree.flatten(tree)
    assert all(a is b for a, b in zip(flat.values, leaves, strict=True))
    assert jax.tree.structure(flat.unflatten(flat.values)) == treedef
    assert len({leaf.key for leaf in flat.graph.leaves}) == len(leaves)
    consistent(flat.graph)


@settings(max_examples=40, deadline=None)
@given(TREES, st.data())
def test_keys_do_not_depend_on_sharing(tree, data):
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray)]
    shared = list(leaves)
    for i in arrays:
        shared[i] = leaves[
            data.draw(st.sampled_from([j for j in arrays if leaves[j].shape == leaves[i].shape]))
        ]
    assert keys(tree) == keys(treedef.unflatten(shared))
