"""What people ran into, as small programs: weights, optimizers, layouts, odd leaves.

Each group names the public threads that it comes from. Directories and metrics are in test_cases_managers.py.
"""

from __future__ import annotations

from collections import OrderedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from toy_training import assert_same, fresh, params, same_bits, trained, zeros

import jaxckpt

ADAM = optax.adam(1e-3)


# "Reset the optimizer" keeps its step count: marin-community/marin#1922, p-doom/jasmine#17


def aged(state, count=10_000):
    """The same optimizer state after many steps."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    age = lambda node: node._replace(count=jnp.int32(count)) if is_adam(node) else node
    return jax.tree.map(age, state, is_leaf=is_adam)


@pytest.mark.parametrize(
    "options",
    [{"skip_slots": True}, {"fresh": ("opt/**",)}, {"fresh": ("opt",)}, {"fresh": "opt/**"}],
)
@pytest.mark.parametrize(
    "optimizer", [ADAM, optax.adamw(1e-3), optax.chain(optax.clip(1.0), optax.lamb(1e-3))]
)
def test_an_optimizer_that_is_reset_counts_from_zero(tmp_path, optimizer, options):
    net = {"w": jnp.ones(4)}
    jaxckpt.save(tmp_path / "a", {"net": net, "opt": aged(trained(optimizer, net)["optimizer"])})
    target = {"net": {"w": jnp.zeros(4)}, "opt": optimizer.init(net)}
    got, status = jaxckpt.restore(tmp_path / "a", target, **options)
    np.testing.assert_array_equal(got["net"]["w"], 1)
    assert_same(got["opt"], target["opt"])
    assert len(status.fresh) == 3
    first, _ = optimizer.update({"w": jnp.ones(4)}, got["opt"], net)
    right, _ = optimizer.update({"w": jnp.ones(4)}, optimizer.init(net), net)
    assert_same(first, right)


def test_one_of_two_optimizers_is_reset(tmp_path):
    saved = {"a": params(1.0), "b": params(2.0), "opt_a": None, "opt_b": None}
    for name in "ab":
        saved[f"opt_{name}"] = jaxckpt.Optimizer(trained(ADAM, saved[name])["optimizer"], of=name)
    jaxckpt.save(tmp_path / "c", saved)
    target = {
        **zeros({"a": params(), "b": params()}),
        "opt_a": jaxckpt.Optimizer(ADAM.init(params()), of="a"),
        "opt_b": jaxckpt.Optimizer(ADAM.init(params()), of="b"),
    }
    got, status = jaxckpt.restore(tmp_path / "c", target, fresh=("opt_b/**",))
    assert_same(got["opt_a"].state, saved["opt_a"].state)
    assert_same(got["opt_b"].state, target["opt_b"].state)
    assert len(status.fresh) == 9


def test_the_weights_alone_are_a_fresh_optimizer_too(tmp_path):
    """The plainest way: do not ask for the optimizer."""
    saved = trained(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", {"net": params()})
    assert_same(got["net"], saved["net"])
    assert len(status.slots_unused) == 8


# Resume with another learning rate: mosaicml/composer#3154, microsoft/CNTK#2578, pytorch/examples#816


@pytest.mark.parametrize(
    "pattern", ["opt/**/learning_rate", "**/learning_rate", "opt/InjectStatefulHyperparamsState/hyperparams"]
)
@pytest.mark.parametrize("make", [optax.adam, optax.adamw, optax.sgd])
def test_the_learning_rate_of_the_command_line_wins(tmp_path, make, pattern):
    inject = optax.inject_hyperparams(make)
    net = {"w": jnp.ones(2)}
    jaxckpt.save(tmp_path / "a", {"net": net, "opt": trained(inject(learning_rate=1e-3), net)["optimizer"]})
    target = {"net": net, "opt": inject(learning_rate=1e-5).init(net)}
    assert np.isclose(jaxckpt.restore(tmp_path / "a", target).tree["opt"].hyperparams["learning_rate"], 1e-3)
    got, status = jaxckpt.restore(tmp_path / "a", target, fresh=(pattern,))
    assert np.isclose(got["opt"].hyperparams["learning_rate"], 1e-5)
    assert int(got["opt"].count) == 3
    assert any(key.endswith("/learning_rate") for key in status.fresh)
    assert not any(".OPTIMIZER_SLOT" in key for key in status.fresh)


def test_a_seed_and_a_flag_of_the_command_line_win(tmp_path):
    jaxckpt.save(tmp_path / "a", {"net": params(), "config": {"seed": 1, "debug": True, "name": "old"}})
    target = {"net": zeros(params()), "config": {"seed": 2, "debug": False, "name": "new"}}
    got, status = jaxckpt.restore(tmp_path / "a", target, fresh=("config/seed", "config/name"))
    assert got["config"] == {"seed": 2, "debug": True, "name": "new"}
    assert set(status.fresh) == {"config/seed", "config/name"}


# A new head: huggingface/transformers PR 12664, tensorflow/tensorflow#51420


def classifier(classes, value=1.0):
    net = {"body": jnp.full((4, 4), value), "head": jnp.full((4, classes), value)}
    return {"net": net, "opt": trained(ADAM, net)["optimizer"]}


def test_another_number_of_classes(tmp_path):
    saved, target = classifier(3), classifier(5, 2.0)
    jaxckpt.save(tmp_path / "a", saved)
    for partial in (False, True, ("net/head",)):  # what differs is never missing
        with pytest.raises(jaxckpt.RestoreError) as caught:
            jaxckpt.restore(tmp_path / "a", target, partial=partial)
        problems = caught.value.problems
        assert [problem.kind for problem in problems] == ["shape"] * 3
        assert {problem.key for problem in problems} == {
            "net/head", "net/head/.OPTIMIZER_SLOT/opt/mu", "net/head/.OPTIMIZER_SLOT/opt/nu",
        }  # fmt: skip
        assert all("[4, 3]" in problem.saved and "[4, 5]" in problem.wanted for problem in problems)
        assert all("fresh" in problem.hint for problem in problems)
    got, status = jaxckpt.restore(tmp_path / "a", target, fresh=("net/head",))
    assert_same(got["net"], {"body": saved["net"]["body"], "head": target["net"]["head"]})
    assert_same(got["opt"][0].mu, {"body": saved["opt"][0].mu["body"], "head": target["opt"][0].mu["head"]})
    assert len(status.fresh) == 3
    assert int(got["opt"][0].count) == 3


def test_a_head_of_another_dtype_and_kind(tmp_path):
    jaxckpt.save(
        tmp_path / "a", {"body": jnp.ones(2), "head": jnp.ones(3, jnp.bfloat16), "extra": {"x": jnp.ones(1)}}
    )
    target = {"body": jnp.zeros(2), "head": jnp.zeros(3), "extra": jnp.zeros(1)}
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "a", target, partial=True)
    assert sorted(problem.kind for problem in caught.value.problems) == ["dtype", "kind"]
    got, status = jaxckpt.restore(tmp_path / "a", target, fresh=("head", "extra"))
    assert_same(got, {**target, "body": jnp.ones(2)})
    assert set(status.fresh) == {"head", "extra"}


def test_a_fresh_head_that_was_never_saved(tmp_path):
    """The exception may name what is in no checkpoint."""
    jaxckpt.save(tmp_path / "a", {"body": jnp.ones(2)})
    got, status = jaxckpt.restore(
        tmp_path / "a", {"body": jnp.zeros(2), "head": jnp.zeros(3)}, fresh=("head",)
    )
    assert_same(got, {"body": jnp.ones(2), "head": jnp.zeros(3)})
    assert (set(status.fresh), set(status.missing)) == ({"head"}, set())


# Functions as leaves: patrick-kidger/equinox#267, #46


def mlp(seed):
    return eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(seed))


def test_an_equinox_model_with_its_activations(tmp_path):
    report = jaxckpt.save(tmp_path / "a", {"net": mlp(0)})
    assert any("activation" in key for key in report.not_saved)
    target = mlp(1)
    got, status = jaxckpt.restore(tmp_path / "a", {"net": target})
    status.assert_consumed().assert_existing_objects_matched()
    assert got["net"].activation is target.activation
    assert_same(eqx.filter(got["net"], eqx.is_array), eqx.filter(mlp(0), eqx.is_array))
    assert len(status.restored) == len(jax.tree.leaves(eqx.filter(target, eqx.is_array)))
    assert not any("activation" in key for key in [*status.restored, *status.missing, *status.unused])


def test_another_activation_is_the_programs(tmp_path):
    jaxckpt.save(tmp_path / "a", {"f": jnp.tanh, "g": eqx.nn.Lambda(jax.nn.relu), "w": jnp.ones(1)})
    target = {"f": jnp.sin, "g": eqx.nn.Lambda(jax.nn.gelu), "w": jnp.zeros(1)}
    got = jaxckpt.restore(tmp_path / "a", target).assert_consumed().assert_existing_objects_matched().tree
    assert got["f"] is jnp.sin
    assert got["g"].fn is target["g"].fn


def test_a_function_without_a_target_is_a_stand_in(tmp_path):
    jaxckpt.save(tmp_path / "a", {"f": jnp.tanh, "w": jnp.ones(1)})
    got, _ = jaxckpt.restore(tmp_path / "a")
    np.testing.assert_array_equal(got["w"], 1)
    assert callable(got["f"])
    with pytest.raises(Exception, match="tanh"):
        got["f"](1.0)


def test_a_function_facing_a_value(tmp_path):
    jaxckpt.save(tmp_path / "a", {"f": jnp.tanh, "x": 3})
    for target in ({"f": 3}, {"x": jnp.tanh}, {"f": jnp.ones(1)}):
        with pytest.raises(jaxckpt.RestoreError) as caught:
            jaxckpt.restore(tmp_path / "a", target, partial=True)
        assert [problem.kind for problem in caught.value.problems] == ["kind"]


# A layer removed from the middle: google/objax#146, tensorflow/tensorflow#33957


def layers(*values, make=list):
    return {"layers": make({"w": jnp.full((2, 2), float(value))} for value in values)}


@pytest.mark.parametrize("make", [list, tuple])
@pytest.mark.parametrize("partial", [False, True])
def test_a_shorter_list_has_to_be_confirmed(tmp_path, make, partial):
    jaxckpt.save(tmp_path / "a", layers(0, 1, 2, make=make))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "a", layers(9, 9, make=make), partial=partial)
    (problem,) = caught.value.problems
    assert (problem.key, problem.kind) == ("layers", "length")
    rules = [
        ({"layers/1": None, "layers/2": "layers/1"}, (0, 2)),
        ({"layers/2": None}, (0, 1)),
        ({"layers/0": None, "layers/1": "layers/0", "layers/2": "layers/1"}, (1, 2)),
    ]
    for rename, wanted in rules:
        got, status = jaxckpt.restore(tmp_path / "a", layers(9, 9, make=make), rename=rename, partial=partial)
        assert_same(got, layers(*wanted, make=make))
        assert len(status.unused) == 1


def test_a_longer_list_is_missing_some(tmp_path):
    jaxckpt.save(tmp_path / "a", layers(0, 1))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "a", layers(9, 9, 9))
    assert [(problem.key, problem.kind) for problem in caught.value.problems] == [("layers/2/w", "missing")]
    got, status = jaxckpt.restore(tmp_path / "a", layers(9, 9, 9), partial=True)
    assert_same(got, layers(0, 1, 9))
    assert set(status.missing) == {"layers/2/w"}


def test_rules_act_at_once(tmp_path):
    jaxckpt.save(tmp_path / "a", layers(0, 1, 2))
    swapped = jaxckpt.restore(
        tmp_path / "a", layers(9, 9, 9), rename={"layers/0": "layers/2", "layers/2": "layers/0"}
    )
    assert_same(swapped.assert_consumed().tree, layers(2, 1, 0))
    turned = {f"layers/{place}": f"layers/{(place + 1) % 3}" for place in range(3)}
    assert_same(jaxckpt.restore(tmp_path / "a", layers(9, 9, 9), rename=turned).tree, layers(2, 0, 1))


def test_rules_that_say_nothing_or_too_much(tmp_path):
    jaxckpt.save(tmp_path / "a", layers(0, 1, 2))
    for rename in ({"layer/0": "layers/1"}, {"layers/0": "layers/1"}, {"layers/7": None}):
        with pytest.raises((jaxckpt.RestoreError, ValueError), match="layer"):
            jaxckpt.restore(tmp_path / "a", layers(9, 9, 9), rename=rename).tree
    jaxckpt.save(tmp_path / "b", {"new": jnp.ones(1)})
    turned_round = pytest.raises((jaxckpt.RestoreError, ValueError), match=r"'new': 'old'|turned round")
    with turned_round:
        jaxckpt.restore(tmp_path / "b", {"old": jnp.ones(1)}, rename={"old": "new"}).tree


def test_momentum_does_not_shift_with_the_layers(tmp_path):
    net = layers(0, 1, 2)
    saved = trained(ADAM, net)
    jaxckpt.save(tmp_path / "a", saved)
    target = fresh(ADAM, layers(9, 9))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "a", target)
    assert {problem.kind for problem in caught.value.problems} == {"length"}
    rename = {"net/layers/1": None, "net/layers/2": "net/layers/1"}
    got = jaxckpt.restore(tmp_path / "a", target, rename=rename).tree
    for field in ("mu", "nu"):
        old, new = (getattr(tree["optimizer"][0], field)["layers"] for tree in (saved, got))
        assert_same(new, [old[0], old[2]])


# The same numbers in another layout: goodfire-ai/spd PR 870, AI-Hypercomputer/maxtext PR 4099 and #528


def test_layers_stacked_for_scan(tmp_path):
    saved = trained(ADAM, {"layers": [{"k": jnp.full((2, 2), float(i))} for i in range(12)]})
    jaxckpt.save(tmp_path / "a", saved)
    target = fresh(ADAM, {"layers": {"k": jnp.zeros((12, 2, 2))}})
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "a", target)
    assert "net/layers/0/k" in str(caught.value)
    assert "stacked" in str(caught.value)
    rule = {"net/layers/k": ("net/layers/*/k", jnp.stack)}
    got = jaxckpt.restore(tmp_path / "a", target, transform=rule)
    got.assert_consumed().assert_existing_objects_matched()
    assert len(got.status.restored["net/layers/k"]) == 12
    stack = lambda tree: jnp.stack([layer["k"] for layer in tree["layers"]])  # natural order: 2 before 10
    assert same_bits(got.tree["net"]["layers"]["k"], stack(saved["net"]))
    for field in ("mu", "nu"):
        old, new = (getattr(tree["optimizer"][0], field) for tree in (saved, got.tree))
        assert same_bits(new["layers"]["k"], stack(old))


def test_layers_unstacked(tmp_path):
    saved = trained(ADAM, {"layers": {"k": jnp.arange(12.0).reshape(3, 2, 2)}})
    jaxckpt.save(tmp_path / "a", saved)
    target = fresh(ADAM, {"layers": [{"k": jnp.zeros((2, 2))} for _ in range(3)]})
    rule = {"net/layers/*/k": ("net/layers/k", lambda stacked, index: stacked[int(index)])}
    got = jaxckpt.restore(tmp_path / "a", target, transform=rule).assert_existing_objects_matched().tree
    for field in ("mu", "nu"):
        old, new = (getattr(tree["optimizer"][0], field)["layers"] for tree in (saved, got))
        assert_same([layer["k"] for layer in new], list(old["k"]))


def test_transposed_squeezed_and_joined(tmp_path):
    net = {
        "dense": {"w": jnp.arange(6.0).reshape(2, 3)},
        "conv": {"b": jnp.arange(3.0).reshape(1, 3)},
        "q": jnp.full((2, 2), 1.0), "k": jnp.full((2, 2), 2.0), "v": jnp.full((2, 2), 3.0),
    }  # fmt: skip
    saved = trained(ADAM, net)
    jaxckpt.save(tmp_path / "a", saved)
    target = fresh(
        ADAM, {"dense": {"w": jnp.zeros((3, 2))}, "conv": {"b": jnp.zeros(3)}, "qkv": jnp.zeros((2, 6))}
    )
    join = lambda q, k, v: np.concatenate([q, k, v], axis=1)
    rules = {
        "net/*/w": ("net/*/w", np.transpose),
        "net/conv/b": ("net/conv/b", np.squeeze),
        "net/qkv": (("net/q", "net/k", "net/v"), join),
    }
    got = jaxckpt.restore(tmp_path / "a", target, transform=rules)
    got.assert_consumed().assert_existing_objects_matched()
    pairs = [(saved["net"], got.tree["net"])]
    pairs += [(getattr(saved["optimizer"][0], f), getattr(got.tree["optimizer"][0], f)) for f in ("mu", "nu")]
    for old, new in pairs:
        assert same_bits(new["dense"]["w"], old["dense"]["w"].T)
        assert same_bits(new["conv"]["b"], old["conv"]["b"][0])
        assert same_bits(new["qkv"], jnp.concatenate([old["q"], old["k"], old["v"]], 1))


def test_a_rule_that_gives_another_shape(tmp_path):
    jaxckpt.save(tmp_path / "a", {"w": jnp.ones((2, 3))})
    for target, function in [({"w": jnp.zeros((3, 2))}, lambda w: w), ({"w": jnp.zeros(6)}, np.transpose)]:
        with pytest.raises(jaxckpt.RestoreError) as caught:
            jaxckpt.restore(tmp_path / "a", target, transform={"w": ("w", function)})
        assert [(p.key, p.kind) for p in caught.value.problems] == [("w", "shape")]


# The tree is one leaf; scalars of odd types: google/orbax#1288, patrick-kidger/equinox#486, #914


@pytest.mark.parametrize(
    "value",
    [np.arange(3.0), 7, -(2**80), 2.5, True, 1 + 2j, np.float32(2), np.bool_(True), "s", "", "\udcff", b"\0\xff", None, {}, [], ()],
    ids=repr,
)  # fmt: skip
def test_a_tree_that_is_one_leaf(tmp_path, value):
    jaxckpt.save(tmp_path / "a", value)
    for got in (jaxckpt.restore(tmp_path / "a", value), jaxckpt.restore(tmp_path / "a")):
        assert type(got.tree) is type(value)
        np.testing.assert_array_equal(got.tree, value)
    keys = list(jaxckpt.load_checkpoint(tmp_path / "a"))
    assert keys == ["."] * (len(jax.tree.leaves(value)))  # fmt: skip


def test_one_jax_array(tmp_path):
    for value in (jnp.arange(3.0), jnp.int32(3), jax.random.key(1), jnp.zeros((0, 2))):
        jaxckpt.save(tmp_path / "a", value, overwrite=True)
        got, _ = jaxckpt.restore(tmp_path / "a", value)
        assert jax.typeof(got) == jax.typeof(value)
        assert (got == value).all()


@pytest.mark.parametrize(
    "tree",
    [{"": 1.0, "a": {"": 2.0}}, {".": 1.0, "": {".": 2.0}}, {"a/b": 1.0, "a": {"b": 2.0}, "a.b": 3.0},
     {"/": {"/": 1.0}, "//": 2.0}, {".E": 1.0, "": 2.0, ".S": 3.0, "/": 4.0}, {"a": {"": {"": 1.0}}}, {" ": 1.0, "ä/ö": 2.0}],
    ids=repr,
)  # fmt: skip
def test_names_that_look_like_the_spelling_of_keys(tmp_path, tree):
    tree = jax.tree.map(lambda value: jnp.full(2, value), tree)
    jaxckpt.save(tmp_path / "b", tree)
    got = (
        jaxckpt.restore(tmp_path / "b", zeros(tree)).assert_consumed().assert_existing_objects_matched().tree
    )
    assert_same(got, tree)
    assert_same(jaxckpt.restore(tmp_path / "b").tree, tree)
    reader = jaxckpt.load_checkpoint(tmp_path / "b")
    assert len(set(reader)) == len(jax.tree.leaves(tree))
    assert "." not in reader


def test_scalars_of_odd_dtypes_do_not_shift_what_follows(tmp_path):
    dtypes = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.int8, np.uint64, np.complex64]
    saved = OrderedDict((f"{place}", dtype(1)) for place, dtype in enumerate(dtypes))
    saved["z"] = np.arange(3)
    jaxckpt.save(tmp_path / "c", saved)
    target = OrderedDict((name, dtype(0)) for name, dtype in zip(saved, dtypes, strict=False))
    got, _ = jaxckpt.restore(tmp_path / "c", OrderedDict(target, z=np.zeros(3, int)))
    assert_same(got, saved)


def test_a_0d_array_and_a_scalar_of_its_kind(tmp_path):
    jaxckpt.save(tmp_path / "c", {"p": jnp.bfloat16(0.5), "step": 7, "q": jnp.int32(9), "z": jnp.arange(3)})
    target = {"p": ml_dtypes.bfloat16(0), "step": jnp.int32(0), "q": 0, "z": np.zeros(3, np.int32)}
    got, _ = jaxckpt.restore(tmp_path / "c", target)
    assert {name: type(value) for name, value in got.items()} == {
        name: type(value) for name, value in target.items()
    }
    assert (float(got["p"]), int(got["step"]), got["q"]) == (0.5, 7, 9)
    np.testing.assert_array_equal(got["z"], np.arange(3))


# Hyperparameters that travel with the weights: patrick-kidger/equinox#370, maxtext PR 4304, PR 4344

CONFIG = {"depth": 2, "scan": True, "name": "gpt", "lr": 3e-4, "sizes": (4, 4), "none": None, "empty": {}}


def test_a_config_comes_before_there_is_a_target(tmp_path):
    jaxckpt.save(tmp_path / "a", jaxckpt.Checkpoint(net={"w": jnp.ones(2)}, config=CONFIG))
    reader = jaxckpt.load_checkpoint(tmp_path / "a")
    assert reader["config/depth"] == 2
    assert reader["config/scan"] is True
    assert reader["config/name"] == "gpt"
    assert type(reader["config/lr"]) is float
    assert reader["config/sizes/1"] == 4
    for path in (reader, tmp_path / "a"):
        got, status = jaxckpt.restore(path, at="config")
        assert got == CONFIG
        assert type(got["sizes"]) is tuple
        assert not any("net" in key for key in [*status.restored, *status.unused])


def test_a_config_that_disagrees_is_replaced_and_can_be_kept(tmp_path):
    jaxckpt.save(tmp_path / "a", jaxckpt.Checkpoint(net={"w": jnp.ones(2)}, config=CONFIG))
    mine = jaxckpt.Checkpoint(net={"w": jnp.zeros(2)}, config={**CONFIG, "scan": False})
    got, status = jaxckpt.restore(tmp_path / "a", mine)
    assert got.config == CONFIG
    assert "config/scan" in status.restored
    assert jaxckpt.restore(tmp_path / "a", mine, fresh=("config",)).tree.config == mine.config


@pytest.mark.parametrize(
    "metadata", [CONFIG, ["a", 1, None], "commit 1f2e", 7, {"ünï": {"deep": [1.5, {"x": []}]}}]
)
def test_metadata_is_kept_and_never_matched(tmp_path, metadata):
    plain = {**metadata, "sizes": list(metadata["sizes"])} if metadata is CONFIG else metadata
    jaxckpt.save(tmp_path / "a", {"w": jnp.ones(2)}, metadata=metadata)
    assert jaxckpt.load_checkpoint(tmp_path / "a").metadata == plain
    assert list(jaxckpt.load_checkpoint(tmp_path / "a")) == ["w"]
    got = jaxckpt.restore(tmp_path / "a", {"w": jnp.zeros(2)})
    assert_same(got.assert_consumed().assert_existing_objects_matched().tree, {"w": jnp.ones(2)})
    with jaxckpt.CheckpointManager(tmp_path / "m") as manager:
        manager.save({"w": jnp.ones(2)}, step=3, metadata=metadata)
        manager.wait()
        assert manager.info(3).metadata == plain


def test_metadata_that_is_no_json_is_refused(tmp_path):
    for metadata in ({"x": jnp.ones(1)}, {"s": {1, 2}}, object()):
        with pytest.raises((TypeError, ValueError)):
            jaxckpt.save(tmp_path / "a", {"w": jnp.ones(2)}, metadata=metadata)
        assert not (tmp_path / "a").exists()
