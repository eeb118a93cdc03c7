from __future__ import annotations

import sys
import types
from collections import OrderedDict, defaultdict, namedtuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_flatten
import trees
from flax.core import FrozenDict
from hypothesis import given, settings
from msgspec.structs import replace

from jaxckpt.graph import rebuild as module
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.marks import Optimizer, Values
from jaxckpt.graph.pytree.functions import MissingFunction
from jaxckpt.graph.pytree.standin import StandIn
from jaxckpt.graph.rebuild import rebuild

KINDS = trees.kinds()


def again(tree):
    flat = flatten(tree)
    return rebuild(flat.graph, flat.values)


@pytest.mark.parametrize("name", KINDS)
def test_rebuilt_trees_have_the_same_leaves_and_names(name):
    flat = flatten(KINDS[name]())
    tree = rebuild(flat.graph, flat.values)
    leaves = jax.tree.leaves(tree)
    assert len(leaves) == len(flat.values)
    for leaf, value, spec in zip(leaves, flat.values, (leaf.spec for leaf in flat.graph.leaves), strict=True):
        if spec.kind == "callable":
            assert isinstance(leaf, MissingFunction)
        elif spec.kind == "skipped":
            assert leaf is ...
        else:
            assert leaf is value
    second = flatten(tree, target=True).graph
    assert second.structure == flat.graph.structure
    assert [leaf.key for leaf in second.leaves] == [leaf.key for leaf in flat.graph.leaves]
    assert second.slots == flat.graph.slots
    assert repr(tree)


EXACT = [
    "a leaf",
    "a Python leaf",
    "None",
    "empty dict",
    "dict",
    "nested",
    "OrderedDict",
    "defaultdict",
    "list",
    "tuple",
    "empty containers",
    "namedtuple",
    "NamedTuple",
    "FrozenDict",
    "integer keys",
    "integer beside string",
    "bool keys",
    "odd names",
    "Values",
    "PerProcess",
    "shared arrays",
    "the guide",
    "optimizer adam",
    "optimizer partition",
    "optimizer named_chain",
    "own optimizer",
    "marked optimizer",
]


@pytest.mark.parametrize("name", EXACT)
def test_type_for_type(name):
    tree = KINDS[name]()
    assert jax.tree.structure(again(tree)) == jax.tree.structure(tree)


def test_types():
    tree = {
        "o": OrderedDict(b=1, a=2),
        "d": defaultdict(list, {"k": 1}),
        "f": FrozenDict(a=1),
        "p": trees.Point(1, 2),
    }
    found = again(tree)
    assert {name: type(child) for name, child in found.items()} == {
        name: type(child) for name, child in tree.items()
    }
    assert found == tree
    assert found["d"].default_factory is list
    assert again(defaultdict(lambda: 3, a=1)).default_factory is None
    assert again({1: 1, 2: 2}) == {1: 1, 2: 2}
    assert list(again(OrderedDict([(2.5, 1), (None, 2), (b"b", 3), ("s", 4)]))) == [2.5, None, b"b", "s"]
    assert again(trees.Point(1, 2)) == trees.Point(1, 2)


def test_marks_keep_what_they_say():
    marked = again(KINDS["marked optimizer"]())["opt"]
    assert isinstance(marked, Optimizer)
    assert marked.of == "net"
    assert (
        again({"net": trees.params(), "o": Optimizer(optax.adam(0.1).init(trees.params()))})["o"].of is None
    )
    assert isinstance(again(Values({"a": 1})), Values)


def test_a_stand_in_is_readable():
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    found = again({"model": model})["model"]
    assert isinstance(found, StandIn)
    assert found.layers[0].weight is model.layers[0].weight
    assert repr(found).startswith("<MLP(layers=(<Linear(weight=")
    assert "layers" in dir(found)
    with pytest.raises(AttributeError, match="MLP has no attribute 'nothing'"):
        _ = found.nothing
    with pytest.raises(RuntimeError, match="relu is not part of the checkpoint"):
        found.activation(1.0)
    keyless = again(trees.Keyless(1, 2))
    assert (keyless[0], keyless[1], list(keyless), len(keyless)) == (1, 2, [1, 2], 2)
    assert isinstance(again(OrderedDict([((1, 2), 3)])), StandIn)
    doubled = jax.tree.map(lambda x: x, found)
    assert repr(doubled) == repr(found)


def test_stand_ins_of_optax_are_optimizers_still():
    flat = flatten(trees.with_optimizer(optax.adam(0.1)))
    found = rebuild(flat.graph, flat.values)
    stand_in = StandIn(flat.graph.structure.children[1].children[0], tuple(found["optimizer"][0]))
    second = flatten({**found, "optimizer": (stand_in, optax.EmptyState())}).graph
    assert [leaf.key for leaf in second.leaves] == [leaf.key for leaf in flat.graph.leaves]
    assert second.slots == flat.graph.slots


def test_a_class_that_is_not_imported(monkeypatch):
    flat = flatten(trees.with_optimizer(optax.adam(0.1)))
    monkeypatch.setitem(sys.modules, "optax._src.transform", None)
    state = flat.graph.structure.children[1].children[0]
    monkeypatch.setitem(sys.modules, state.cls.partition(":")[0], None)
    found = rebuild(flat.graph, flat.values)["optimizer"][0]
    assert isinstance(found, StandIn)
    assert found.count is flat.values[3]


class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise AssertionError("no code of a module may run")


class Noisy(namedtuple("Noisy", ["x"])):
    def __new__(cls, *args):
        raise AssertionError("no code of a class may run")


def hostile(cls, names=("x",)):
    flat = flatten(trees.Point(1, 2) if len(names) == 2 else trees.Typed(1, 2)._replace(b=None))
    structure = flat.graph.structure
    fields = tuple(replace(structure.names[0], text=name, name=name) for name in names)
    structure = replace(structure, cls=cls, names=fields, children=structure.children[: len(names)])
    return rebuild(replace(flat.graph, structure=structure), flat.values)


def test_nothing_named_in_a_file_is_imported_or_run(monkeypatch):
    module_name = "jaxckpt_test_hostile"
    fake = Lazy(module_name)
    fake.__dict__["Noisy"] = Noisy
    fake.__dict__["point"] = lambda *_: 1 / 0
    monkeypatch.setitem(sys.modules, module_name, fake)
    assert type(hostile(f"{module_name}:Noisy")) is Noisy
    for cls in (
        f"{module_name}:gone",
        f"{module_name}:point",
        "os:system",
        "antigravity:x",
        "builtins:exec",
        "",
        ":",
        "x",
    ):
        assert isinstance(hostile(cls), StandIn)
    assert "antigravity" not in sys.modules
    assert isinstance(hostile("trees:Point", ("a", "b")), StandIn)  # other fields
    assert isinstance(hostile("builtins:tuple"), StandIn)


def test_known_classes():
    key = f"{trees.Keyed.__module__}:Keyed"
    module.known_classes[key] = lambda structure, children: (
        structure.cls,
        [n.text for n in structure.names],
        children,
    )
    try:
        assert again(trees.Keyed(1, 2)) == (key, ["a", "b"], (1, 2))
    finally:
        del module.known_classes[key]


def test_the_number_of_values_is_checked():
    flat = flatten([1, 2])
    with pytest.raises(ValueError, match="1 values for 2 leaves"):
        rebuild(flat.graph, [1])
    with pytest.raises(ValueError, match="1 values for 2 leaves"):
        flat.unflatten([1])


def test_values_may_be_others():
    flat = flatten({"a": jnp.ones(2), "b": 3})
    assert rebuild(flat.graph, [np.zeros(1), "x"])["b"] == "x"


@settings(max_examples=60, deadline=None)
@given(test_flatten.TREES)
def test_plain_trees_come_back(tree):
    found = again(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True)
    assert all(a is b for a, b in leaves)
