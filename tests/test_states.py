"""What is an optimizer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import trees
from test_slots import keys, pairs, slots, under

from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.marks import Values

adam = optax.adam(0.1)


def optimizers(tree: Any) -> set[str]:
    return {node.key for node in flatten(tree).graph.nodes if node.kind == "optimizer"}


class Carry(NamedTuple):
    params: Any
    rng: Any


def test_the_outermost_subtree_of_states():
    net = trees.params()
    state = adam.init(net)
    assert optimizers({"net": net, "opt": state}) == {"opt"}
    assert optimizers({"net": net, "o": {"gen": state, "disc": state}}) == {"o/gen", "o/disc"}
    assert optimizers({"net": net, "o": OrderedDict(gen=state, disc=state)}) == {"o"}
    assert optimizers({"net": net, "o": [state, state]}) == {"o/0", "o/1"}
    assert optimizers({"net": net, "o": (state, state)}) == {"o"}
    assert optimizers((net, state)) == {"1"}
    assert optimizers((net, state, jnp.ones(2))) == {"1"}
    assert optimizers({"a": (), "b": None, "c": OrderedDict()}) == set()
    assert optimizers({"a": optax.MaskedNode(), "b": optax.LookaheadParams(net, net)}) == set()
    assert optimizers({"tx": adam}) == set()
    assert optimizers(state) == {"."}
    assert optimizers({"net": net, "o": (state, None)}) == {"o"}


def test_foreign_namedtuples_in_a_chain():
    net = trees.params()
    tree = trees.chain_with_custom()
    assert optimizers(tree) == {"opt"}
    assert under(tree, "opt") == {"ScaleByAdamState/count", "Custom/count"}
    assert {n for _, _, n in pairs(tree)} == {"mu", "nu", "momentum"}
    own = trees.Custom(jnp.int32(0), jax.tree.map(jnp.zeros_like, net))
    assert optimizers({"net": net, "opt": (adam.init(net), own)}) == {"opt"}
    assert optimizers({"net": net, "opt": (own, optax.EmptyState())}) == {"opt"}
    assert optimizers({"net": net, "opt": own}) == set()
    wrapped = optax.MaskedState(own)
    assert under({"net": net, "opt": wrapped}, "opt") == {"Custom/count"}


def test_parameters_that_are_a_namedtuple_are_no_state():
    net = trees.Typed(jnp.ones((2, 2)), jnp.ones(2))
    for transform in (adam, optax.scale_by_adam(), optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)):
        tree = (net, transform.init(net))
        assert optimizers(tree) == {"1"}
        assert keys(tree)[:2] == ["0/w", "0/b"]
    carry = (Carry(trees.params(), jax.random.key(0)), adam.init(trees.params()))
    assert optimizers(carry) == {"1"}
    assert len(slots(carry)) == 6
    assert optimizers({"a": carry, "b": carry}) == {"a/1", "b/1"}


def test_values_hold_no_optimizer():
    tree = {"net": trees.params(), "opt": Values(adam.init(trees.params()))}
    assert optimizers(tree) == set()
    assert flatten(tree).graph.left_out == 0
    assert "opt/0/mu/l1/bias" in keys(tree)
    tree = {"net": Values(trees.params()), "opt": adam.init(trees.params())}
    assert ("opt", "net/l1/bias", "mu") in pairs(tree)
