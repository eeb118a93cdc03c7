from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import trees
from flax import nnx

from jaxckpt.graph.flatten import flatten, object_graph
from jaxckpt.graph.marks import Optimizer
from jaxckpt.graph.model import SkippedSpec

adam = optax.adam(0.1)


def keys(tree: Any, **options: Any) -> list[str]:
    return [leaf.key for leaf in flatten(tree, **options).graph.leaves]


def slots(tree: Any) -> dict[str, str]:
    """Key of each slot to its variable's."""
    return {leaf.key: leaf.variable for leaf in flatten(tree).graph.leaves if leaf.variable is not None}


def pairs(tree: Any) -> set[tuple[str, str, str]]:
    return {(slot.optimizer, slot.variable, slot.name) for slot in flatten(tree).graph.slots}


def under(tree: Any, prefix: str) -> set[str]:
    return {key.removeprefix(f"{prefix}/") for key in keys(tree) if key.startswith(f"{prefix}/")}


def test_factored_moments_are_slots():
    net = {"w": jnp.ones((256, 130)), "b": jnp.ones(4)}
    tree = {"net": net, "opt": optax.adafactor(0.1).init(net)}
    assert {name for _, _, name in pairs(tree)} == {"v_row", "v_col", "v"}


# ---- names ----


def test_keys_do_not_depend_on_the_chain():
    net = trees.params()
    plain = under({"net": net, "optimizer": adam.init(net)}, "net")
    count = {"ScaleByAdamState/count"}
    assert under({"net": net, "optimizer": adam.init(net)}, "optimizer") == count
    for transform in (
        optax.chain(optax.clip(1.0), adam),
        optax.chain(optax.chain(optax.identity(), adam), optax.clip(1.0)),
        optax.adamw(0.1),
        optax.adam(optax.constant_schedule(0.1)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.MultiSteps(adam, 2),
        optax.masked(adam, True),
        optax.partition({"a": adam, "b": optax.set_to_zero()}, {"l1": "a", "l2": "a"}),
        optax.named_chain(("x", optax.clip(1.0)), ("y", adam)),
        optax.apply_if_finite(adam, 3),
        optax.contrib.schedule_free(adam, 0.1),
        optax.contrib.split_real_and_imaginary(adam),
    ):
        tree = {"net": net, "optimizer": transform.init(net)}
        assert plain <= under(tree, "net"), transform
        assert count <= under(tree, "optimizer"), transform
        assert not any("inner" in key or "/0/" in key for key in keys(tree))


def test_wrappers_keep_their_own_variables():
    tree = trees.with_optimizer(optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    found = under(tree, "optimizer")
    assert "InjectStatefulHyperparamsState/hyperparams/learning_rate" in found
    assert "InjectStatefulHyperparamsState/count" in found
    assert "ScaleByAdamState/count" in found


def test_a_parameter_called_as_a_hyperparameter():
    net = {"learning_rate": jnp.ones(())}
    tree = {"net": net, "opt": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1).init(net)}
    assert pairs(tree) == set()
    assert "InjectStatefulHyperparamsState/hyperparams/learning_rate" in under(tree, "opt")


def test_labels():
    net = trees.params()
    graph = flatten(
        trees.with_optimizer(optax.partition({"a": adam, "b": adam}, {"l1": "a", "l2": "b"}))
    ).graph
    states = [leaf.state for leaf in graph.leaves if leaf.state is not None]
    assert {(s.ordinal, s.labels) for s in states} == {(1, ("a",)), (2, ("b",))}
    assert "optimizer/ScaleByAdamState.2/count" in graph.by_key
    assert "net/l2/kernel/.OPTIMIZER_SLOT/optimizer/mu" in graph.by_key  # the first `mu` of that variable
    chain = optax.named_chain(("one", adam), ("two", optax.trace(0.9))).init(net)
    found = {leaf.state.labels for leaf in flatten({"net": net, "o": chain}).graph.leaves if leaf.state}
    assert found == {("one",), ("two",)}


def test_second_slots_of_one_name():
    tree = trees.with_optimizer(optax.chain(optax.scale_by_adam(), optax.scale_by_lion()))
    names = {name for _, variable, name in pairs(tree) if variable == "net/l1/bias"}
    assert names == {"mu", "nu", "mu.2"}
    leaf = flatten(tree).graph
    second = leaf.leaves[leaf.by_key["net/l1/bias/.OPTIMIZER_SLOT/optimizer/mu.2"]]
    assert (second.state.state_class, second.state.ordinal) == ("ScaleByLionState", 1)


def test_second_states_of_one_class():
    tree = trees.with_optimizer(
        optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.trace(0.5), optax.scale_by_adam())
    )
    assert {"ScaleByAdamState/count", "ScaleByAdamState.2/count"} == under(tree, "optimizer")
    names = {name for _, variable, name in pairs(tree) if variable == "net/l1/bias"}
    assert names == {"trace", "trace.2", "mu", "nu", "mu.2", "nu.2"}


def test_suffixes():
    net = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    tree = {"net": net, "opt": optax.sm3(0.1).init(net)}
    assert {(v, n) for _, v, n in pairs(tree)} == {
        ("net/w", "mu/0"), ("net/w", "mu/1"), ("net/b", "mu/0"), ("net/w", "nu"), ("net/b", "nu"),
    }  # fmt: skip
    state = flatten(tree).graph.leaves[2].state
    assert (state.path, state.suffix) == (("b",), ("0",))
    twice = {"net": net, "opt": optax.chain(optax.scale_by_sm3(), optax.scale_by_sm3()).init(net)}
    assert "net/w/.OPTIMIZER_SLOT/opt/mu.2/1" in keys(twice)
    assert ("opt", "net/c", "mu/real") in pairs(
        {"net": trees.complex_params()["net"], "opt": trees.complex_params()["optimizer"]}
    )


def test_state_fields():
    graph = flatten({"m": {"net": trees.params(), "opt": adam.init(trees.params())}}).graph
    leaf = graph.leaves[graph.by_key["m/net/l1/bias/.OPTIMIZER_SLOT/m/opt/mu"]]
    state = leaf.state
    assert (state.optimizer, state.state_class, state.ordinal, state.field) == (
        "m/opt",
        "ScaleByAdamState",
        1,
        "mu",
    )
    assert (state.path, state.suffix, state.labels, state.is_slot) == (("l1", "bias"), (), (), True)
    count = graph.leaves[graph.by_key["m/opt/ScaleByAdamState/count"]].state
    assert (count.field, count.path, count.is_slot) == ("count", (), False)


# ---- which parameters ----


def test_holes():
    net = {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "d": jnp.ones(4)}, "n": None}
    masked = optax.masked(adam, {"a": True, "b": False, "n": None})
    assert {v for _, v, _ in pairs({"net": net, "opt": masked.init(net)})} == {"net/a"}
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    tree = {"model": model, "opt": adam.init(eqx.filter(model, eqx.is_inexact_array))}
    assert {v for _, v, _ in pairs(tree)} == {
        f"model/layers/{i}/{n}" for i in (0, 1) for n in ("weight", "bias")
    }


def test_an_nnx_state_may_lack_parameters():
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.l = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.n = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    model = Net()
    state = adam.init(nnx.state(model, nnx.Param))
    wanted = {"l/kernel", "l/bias", "n/scale", "n/bias"}
    for net in (nnx.state(model), model):
        graph = flatten({"net": net, "opt": state}, target=True).graph
        assert {slot.variable.removeprefix("net/") for slot in graph.slots} == wanted
        assert graph.left_out == 0


def test_nnx_optimizers():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    graph = flatten({"net": model, "opt": nnx.Optimizer(model, adam, wrt=nnx.Param)}, target=True).graph
    assert {(slot.optimizer, slot.variable) for slot in graph.slots} == {
        ("opt/opt_state", "net/kernel"),
        ("opt/opt_state", "net/bias"),
    }
    assert "opt/opt_state/ScaleByAdamState/count" in graph.by_key


def test_the_first_tree_of_the_same_shapes():
    small, large = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
    tree = {"a": small, "b": large, "c": large, "opt": adam.init(large)}
    assert {v for _, v, _ in pairs(tree)} == {"b/w"}
    # Depth counts before the alphabet: edges are in breadth-first order.
    assert {v for _, v, _ in pairs({"a": {"ema": large}, "b": large, "opt": adam.init(large)})} == {"b/w"}
    # What is inside another optimizer holds no parameters.
    tree = {"a": optax.trace(0.9).init(large), "opt": adam.init(large), "z": large}
    assert {v for _, v, _ in pairs(tree)} == {"z/w"}


def test_factored_moments_follow_the_shapes_of_the_others():
    first, second = {"w": jnp.ones((256, 130))}, {"w": jnp.ones((130, 256))}
    tree = {"a": first, "b": second, "opt": optax.chain(optax.adafactor(0.1), optax.trace(0.9)).init(second)}
    assert {v for _, v, _ in pairs(tree)} == {"b/w"}


def test_of_decides():
    net = {"w": jnp.ones(2)}
    tree = {"a": net, "b": net, "opt": Optimizer(adam.init(net), of="b")}
    assert {v for _, v, _ in pairs(tree)} == {"b/w"}
    tree = {"a": {"x": net}, "b": {"x": net}, "opt": Optimizer(adam.init(net), of="b")}
    assert {v for _, v, _ in pairs(tree)} == {"b/x/w"}
    tree = {"a": net, "opt": Optimizer(adam.init(net), of="not/here")}
    assert pairs(tree) == set()
    assert flatten(tree).graph.left_out == 2
    with pytest.raises(TypeError, match="of="):
        Optimizer(net, of=net)  # pyright: ignore


def test_optimizers_of_somebody_else():
    tree = trees.own_optimizer()
    assert {name for _, _, name in pairs(tree)} == {"m"}
    assert under(tree, "opt") == {"dict/t"}
    net = trees.params()
    custom = trees.Custom(jnp.int32(0), jax.tree.map(jnp.zeros_like, net))
    tree = {"net": net, "opt": Optimizer(custom)}
    assert under(tree, "opt") == {"Custom/count"}
    assert {n for _, _, n in pairs(tree)} == {"momentum"}
    tree = {"net": net, "opt": Optimizer({"g": adam.init(net), "d": adam.init(net)})}
    assert under(tree, "opt") == {"ScaleByAdamState/count", "ScaleByAdamState.2/count"}
    tree = {"net": net, "opt": Optimizer((jnp.int32(1), jax.tree.map(jnp.zeros_like, net)))}
    assert under(tree, "opt") == {"tuple/0"}
    assert {n for _, _, n in pairs(tree)} == {"1"}


def test_bare_parameters():
    tree = trees.bare()
    assert {(v, n) for _, v, n in pairs(tree)} == {("w", "mu"), ("w", "nu")}
    w = jnp.ones(3)
    assert {v for _, v, _ in pairs({"a": jnp.ones(2), "b": w, "opt": adam.init(w)})} == {"b"}
    deep = {"m": {"w": w, "opt": adam.init(w)}}  # below the top only by name
    assert pairs(deep) == set()
    assert "m/opt/ScaleByAdamState/mu" in keys(deep)
    assert flatten(deep).graph.left_out == 0
    deep["m"]["opt"] = Optimizer(adam.init(w), of="m/w")
    assert {v for _, v, _ in pairs(deep)} == {"m/w"}
    scalar = {"w": jnp.float32(1), "opt": adam.init(jnp.float32(1))}
    assert pairs(scalar) == set()
    sm3 = {"w": jnp.ones((2, 3)), "opt": optax.scale_by_sm3().init(jnp.ones((2, 3)))}
    assert {n for _, _, n in pairs(sm3)} == {"mu/0", "mu/1", "nu"}
    key = {"w": jnp.ones((2,)), "k": jax.random.PRNGKey(0), "opt": optax.add_noise(0.1, 0.1, key=0).init(w)}
    assert pairs(key) == set()


def test_parameters_of_every_container():
    for net in (
        trees.Typed(jnp.ones((2, 2)), jnp.ones(2)),
        [jnp.ones((2, 2)), {"a": jnp.ones(2)}],
        (jnp.ones(2), (jnp.ones(3),)),
        trees.FlaxData(jnp.ones(2)),
        trees.Registered(jnp.ones(2), [jnp.ones(3)]),
        trees.Keyless(jnp.ones(2), {"a": jnp.ones(3)}),
        trees.Keyed(jnp.ones(2), [jnp.ones(3)]),
        {"params": {"d": {"k": jnp.ones(2)}}, "batch_stats": {"m": jnp.ones(2)}},
        {0: jnp.ones(2), 1: jnp.ones(3)},
        {"a.b": jnp.ones(2), "": jnp.ones(3)},
    ):
        tree = {"net": net, "opt": adam.init(net)}
        variables = {key for key in keys(tree) if key.startswith("net/") and "SLOT" not in key}
        assert {v for _, v, _ in pairs(tree)} == variables, net
        assert len(slots(tree)) == 2 * len(variables)


def test_a_train_state():
    assert {(o, v) for o, v, _ in pairs(trees.train_state())} == {
        ("opt_state", f"params/{v}") for v in ("l1/kernel", "l1/bias", "l2/kernel")
    }
    lookahead = optax.lookahead(optax.sgd(0.1, momentum=0.9), 5, 0.5)
    net = optax.LookaheadParams.init_synced(trees.params())
    tree = {"net": net, "opt": lookahead.init(net)}
    assert ("opt", "net/fast/l1/bias", "trace") in pairs(tree)


def test_slots_belong_to_a_name():
    x = jnp.ones((2, 3))
    net = {"embed": x, "head": {"kernel": x}}
    tree = {"net": net, "opt": adam.init(net)}
    apart = {"net": jax.tree.map(jnp.copy, net), "opt": tree["opt"]}
    assert keys(tree) == keys(apart)
    assert flatten(tree).graph.slots == flatten(apart).graph.slots


def test_a_slot_that_is_its_variable():
    net = trees.params()
    graph = flatten({"net": net, "opt": optax.contrib.dog(0.1).init(net)}).graph
    slot = graph.leaves[graph.by_key["net/l1/bias/.OPTIMIZER_SLOT/opt/init_params"]]
    variable = graph.leaves[graph.by_key["net/l1/bias"]]
    same = slot.node == variable.node
    assert same == (graph.nodes[slot.node].kind == "variable")


# ---- slots without variables ----


def test_an_optimizer_alone():
    state = {"opt": adam.init(trees.params())}
    saved = flatten(state).graph
    assert saved.left_out == 6 == object_graph(state).left_out
    assert [leaf.key for leaf in saved.leaves if leaf.kind != "skipped"] == ["opt/ScaleByAdamState/count"]
    orphan = flatten(state, target=True).graph.leaves[1]
    assert orphan.key == saved.leaves[1].key == "opt/ScaleByAdamState/mu/l1/bias"
    assert orphan.variable is None
    assert orphan.state.is_slot
    assert orphan.state.path == ("l1", "bias")
    assert isinstance(saved.leaves[1].spec, SkippedSpec)
    assert orphan.kind == "array"
    assert saved.slots == ()
    sm3 = flatten({"opt": optax.sm3(0.1).init(trees.params())}, target=True).graph
    assert "opt/ScaleBySM3State/mu/l1/bias/0" in sm3.by_key


def test_left_out_counts_no_hyperparameters():
    hyper = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    graph = flatten({"opt": hyper.init(trees.params()), "step": jnp.int32(1)}).graph
    assert graph.left_out == 6
    assert "opt/InjectStatefulHyperparamsState/hyperparams/learning_rate" in graph.by_key
    assert flatten({"opt": optax.flatten(adam).init(trees.params())}).graph.left_out == 0
    two = (adam.init(trees.params()), adam.init({"other": jnp.ones(2)}))
    assert flatten({"net": trees.params(), "opt": two}).graph.left_out == 2


def test_a_target_without_some_parameters():
    tree = {"net": ..., "opt": adam.init(trees.params())}
    graph = flatten(tree, target=True).graph
    assert graph.left_out == 6
    assert graph.leaves[0].kind == "skipped"
    net = {**trees.params(), "l2": {"kernel": ...}}
    graph = flatten({"net": net, "opt": adam.init(trees.params())}, target=True).graph
    assert "net/l2/kernel/.OPTIMIZER_SLOT/opt/mu" in graph.by_key


def test_abstract_optimizers():
    tree = jax.eval_shape(lambda: trees.with_optimizer(adam))
    assert keys(tree, target=True) == keys(trees.with_optimizer(adam))


def test_numpy_states():
    tree = jax.tree.map(np.asarray, trees.with_optimizer(adam))
    assert keys(tree) == keys(trees.with_optimizer(adam))
