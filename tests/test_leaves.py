from __future__ import annotations

import dataclasses
import datetime
import enum
import fractions
import io
import pathlib
import random

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
import trees

from jaxckpt.errors import UnsupportedLeafError
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.model import ArraySpec, IteratorSpec, Sharding, SkippedSpec, ValueSpec


def keys(tree, **options):
    return [leaf.key for leaf in flatten(tree, **options).graph.leaves]


def spec(leaf, **options):
    return flatten(leaf, **options).graph.leaves[0].spec


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
    assert spec(abstract, target=True) == msgspec.structs.replace(wanted, abstract=True)


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
