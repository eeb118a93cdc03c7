"""TensorFlow's habits that are kept, or bettered: names, sharing, matching, slots, containers, deferral.

The ids are those of the study of its behaviour. What it loses in silence is in test_silent_losses.py, what
concerns directories in test_tensorflow_directories.py.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import os
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import CountIter, assert_same, fresh, params, same_bits, trained, zeros

import jaxckpt

ADAM = optax.adam(1e-2)


def keys(path):
    return list(jaxckpt.load_checkpoint(path))


# A: names


def test_keyword_arguments_are_edges_in_sorted_order(tmp_path):
    """A1."""
    jaxckpt.Checkpoint(b=jnp.ones(1), a=2, c={"z": 1, "y": 2}).write(tmp_path / "c")
    assert keys(tmp_path / "c") == ["a", "b", "c/y", "c/z"]


def test_edges_beside_those_of_a_root(tmp_path):
    """A7: the edges attach to the root; its own names stay."""
    root = {"net": {"w": jnp.ones(2)}, "v": 1}
    jaxckpt.Checkpoint(root, step=5).write(tmp_path / "c")
    assert set(keys(tmp_path / "c")) == {"net/w", "v", "step"}
    got, _ = jaxckpt.restore(tmp_path / "c", {**zeros(root), "step": 0})
    assert got["step"] == 5
    got = jaxckpt.Checkpoint({"net": {"w": jnp.zeros(2)}, "v": 0}, step=0).restore(tmp_path / "c").tree
    assert (got.step, got.v) == (5, 1)
    same_bits(got.net["w"], root["net"]["w"])


@pytest.mark.parametrize("root", [{"v": 1}, jaxckpt.Checkpoint(v=1), collections.namedtuple("Root", "v")(1)])
def test_an_edge_that_the_root_has(root):
    """A7."""
    with pytest.raises(
        ValueError, match=r"Cannot create a Checkpoint with keyword argument v if root.v already exists."
    ):
        jaxckpt.Checkpoint(root, v=2)


@pytest.mark.parametrize("root", [{}, [], (), 0, False, ""])
def test_only_none_is_no_root(tmp_path, root):
    """A8: a falsy root is a root all the same."""
    jaxckpt.Checkpoint(root, x=1).write(tmp_path / "c")
    assert keys(tmp_path / "c") == (["x"] if isinstance(root, dict | list | tuple) else [".", "x"])
    got = jaxckpt.Checkpoint(root, x=0).restore(tmp_path / "c").assert_consumed().tree
    assert got == jaxckpt.Checkpoint(root, x=1)
    jaxckpt.Checkpoint(None, x=1).write(tmp_path / "d")
    assert keys(tmp_path / "d") == ["x"]


@pytest.mark.parametrize("name", ["save_counter", "save", "restore", "write", "read", "replace"])
def test_reserved_names(name):
    """A10."""
    with pytest.raises(ValueError, match=name):
        jaxckpt.Checkpoint(**{name: 1})


def test_the_shortest_path_names_a_node(tmp_path):
    """A11, A13: breadth first, ties by edge order; every name can be read; the bytes are there once."""
    shared = jnp.arange(50_000.0)
    tree = {"a": {"deep": {"er": shared}}, "b": [shared], "c": [shared]}
    once = jaxckpt.save(tmp_path / "one", {"a": shared}).nbytes
    assert jaxckpt.save(tmp_path / "c", tree).nbytes < once + 50_000
    graph = jaxckpt.load_checkpoint(tmp_path / "c").graph
    (node,) = [node for node in graph.nodes if node.kind == "variable"]
    assert node.key == "b/0"
    reader = jaxckpt.load_checkpoint(tmp_path / "c")
    assert set(reader) == {"a/deep/er", "b/0", "c/0"}
    assert all(same_bits(reader[key], shared) for key in reader)
    tops = [edge for edge in graph.edges if graph.nodes[edge.child] == node]
    assert sorted(edge.name for edge in tops) == ["0", "0", "er"]


def test_without_a_target_what_was_one_comes_back_as_one(tmp_path):
    """A13."""
    shared = jnp.arange(3.0)
    jaxckpt.save(tmp_path / "c", {"a": shared, "b": shared, "c": shared + 0})
    got, _ = jaxckpt.restore(tmp_path / "c")
    assert got["a"] is got["b"]
    assert got["a"] is not got["c"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("a.b", "a..b"), ("a/b", "a.Sb"), ("..", "...."), ("./", "...S"), ("", ".E"), (".S", "..S")],
)
def test_names_are_escaped(tmp_path, name, key):
    """A12."""
    jaxckpt.save(tmp_path / "c", {name: {"x": 1}, "other": 2})
    assert set(keys(tmp_path / "c")) == {f"{key}/x", "other"}
    got, _ = jaxckpt.restore(tmp_path / "c", {name: {"x": 0}})
    assert got == {name: {"x": 1}}


# B: saving


def test_numbered_saves(tmp_path):
    """B1: `prefix-N` and the stored counter N."""
    ckpt = jaxckpt.Checkpoint(x=1)
    assert [ckpt.save(tmp_path / "run") for _ in range(3)] == [str(tmp_path / f"run-{n}") for n in (1, 2, 3)]
    # One more than any number in the directory: TensorFlow's counter goes on, too, under another prefix.
    assert ckpt.save(tmp_path / "other") == str(tmp_path / "other-4")
    assert jaxckpt.latest_checkpoint(tmp_path) == str(tmp_path / "other-4")


def test_write_makes_exactly_one_path(tmp_path):
    """B3: no state file, no number."""
    jaxckpt.Checkpoint(x=1).write(tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_an_existing_path(tmp_path):
    """B5: refused, or replaced as a whole."""
    jaxckpt.save(tmp_path / "c", {"x": 1, "gone": jnp.ones(3)})
    with pytest.raises(jaxckpt.CheckpointExistsError, match="overwrite"):
        jaxckpt.save(tmp_path / "c", {"x": 2})
    with pytest.raises(FileExistsError):
        jaxckpt.Checkpoint(x=2).write(tmp_path / "c")
    assert jaxckpt.load_checkpoint(tmp_path / "c")["x"] == 1
    jaxckpt.save(tmp_path / "c", {"x": 2}, overwrite=True)
    assert dict(jaxckpt.load_checkpoint(tmp_path / "c")) == {"x": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    """B5: `overwrite=True` speaks of checkpoints, not of other people's directories."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("...")
    with pytest.raises(jaxckpt.CheckpointExistsError):
        jaxckpt.save(tmp_path / "c", {"x": 2})
    assert (tmp_path / "c" / "thesis.tex").read_text() == "..."


def test_the_counter_fails_no_assertion(tmp_path):
    """B6: read what was saved, restore what was written."""
    ckpt = jaxckpt.Checkpoint(x=1)
    for path in (ckpt.save(tmp_path / "run"), ckpt.write(tmp_path / "w")):
        for read in (jaxckpt.Checkpoint(x=0).read, jaxckpt.Checkpoint(x=0).restore):
            assert read(path).assert_consumed().assert_existing_objects_matched().tree.x == 1
        assert keys(path) == ["x"]


def test_a_traced_value_cannot_be_saved(tmp_path):
    """B14."""

    @jax.jit
    def step(x):
        jaxckpt.save(tmp_path / "c", {"net": {"w": x}})
        return x

    with pytest.raises(jaxckpt.UnsupportedLeafError, match="net/w"):
        step(jnp.ones(2))
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="net/w"):
        jax.grad(lambda x: [jaxckpt.save(tmp_path / "c", {"net": {"w": x}}), x.sum()][1])(jnp.ones(2))
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="net/w"):
        jaxckpt.save(tmp_path / "c", {"net": {"w": jax.ShapeDtypeStruct((2,), "float32")}})
    assert not list(tmp_path.iterdir())


def test_a_deleted_array_cannot_be_saved(tmp_path):
    x = jnp.ones(3)
    x.delete()
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="net/w"):
        jaxckpt.save(tmp_path / "c", {"net": {"w": x}})


# C: matching


class Pair(NamedTuple):
    """Fields by name or index."""

    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    """Attributes."""

    a: Any
    b: Any


@pytest.mark.parametrize("saved", [dict, Pair, Data, jaxckpt.Checkpoint, collections.OrderedDict])
@pytest.mark.parametrize(
    "target", [dict, Pair, Data, jaxckpt.Checkpoint, lambda **kw: collections.defaultdict(list, **kw)]
)
def test_only_names_matter(tmp_path, saved, target):
    """C1."""
    jaxckpt.save(tmp_path / "c", {"x": saved(a=jnp.ones(2), b=2)})
    got = jaxckpt.restore(tmp_path / "c", {"x": target(a=jnp.zeros(2), b=0)}).assert_consumed().tree
    assert_same(got, {"x": target(a=jnp.ones(2), b=2)})


@pytest.mark.parametrize(
    "saved", [list, tuple, lambda items: Pair(*items), lambda items: dict(zip("01", items, strict=True))]
)
@pytest.mark.parametrize(
    "target", [list, tuple, lambda items: Pair(*items), lambda items: dict(zip("01", items, strict=True))]
)
def test_an_index_is_a_name(tmp_path, saved, target):
    """C1, E14: lists, tuples and dicts of digits interchange; a namedtuple's fields match an index, too."""
    jaxckpt.save(tmp_path / "c", {"x": saved([jnp.ones(2), 2])})
    likes = target([jnp.zeros(2), 0])
    if {type(saved([1, 2])), type(likes)} == {Pair, dict}:
        return  # a dict of digits is no plain sequence
    got = jaxckpt.restore(tmp_path / "c", {"x": likes}).assert_consumed()
    assert_same(got.tree, {"x": target([jnp.ones(2), 2])})


def test_a_renamed_edge(tmp_path):
    """C2: strict, with a hint; a rule says it."""
    jaxckpt.save(tmp_path / "c", {"net": {"encoder": jnp.ones(2), "other": 1}})
    target = {"net": {"encodr": jnp.zeros(2), "other": 0}}
    with pytest.raises(jaxckpt.RestoreError, match=r"did you mean.*net/encoder") as caught:
        jaxckpt.restore(tmp_path / "c", target)
    assert [(p.key, p.kind) for p in caught.value.problems] == [("net/encodr", "missing")]
    got = jaxckpt.restore(tmp_path / "c", target, rename={"net/encoder": "net/encodr"}).assert_consumed().tree
    assert_same(got, {"net": {"encodr": jnp.ones(2), "other": 1}})


def test_one_pending_value_for_several_places(tmp_path):
    """C4, C5: at any depth, any number of times; each result is its own."""
    jaxckpt.save(tmp_path / "c", {"a": {"b": {"c": [jnp.ones(2), {"d": jnp.full(2, 2.0)}]}}})
    start = jaxckpt.restore(tmp_path / "c", {})
    whole = start.attach("a/b/c", [jnp.zeros(2), {"d": jnp.zeros(2)}])
    assert_same(whole.assert_consumed().tree["a"]["b"]["c"], [jnp.ones(2), {"d": jnp.full(2, 2.0)}])
    part = start.attach("a/b", {"c": [jnp.zeros(2)]})
    assert part.tree["a"]["b"]["c"][0][0] == 1
    again = start.attach("a/b/c", [jnp.zeros(2), {"d": jnp.zeros(2)}])
    assert_same(again.tree, whole.tree)
    assert start.tree == {}


def test_attaching_what_was_never_saved(tmp_path):
    """C4."""
    jaxckpt.save(tmp_path / "c", {"a": 1})
    restored = jaxckpt.restore(tmp_path / "c", {"a": 0}).attach("new/one", jnp.full(2, 7.0))
    assert (restored.tree["new"]["one"] == 7).all()
    assert set(restored.status.missing) == {"new/one"}
    with pytest.raises(jaxckpt.RestoreAssertionError, match="new/one"):
        restored.assert_existing_objects_matched()
    with pytest.raises(ValueError, match="a"):
        restored.attach("a", 3)


def test_each_restore_is_its_own_value(tmp_path):
    """C7, C8: nothing is global, whatever the order."""
    for value in (1.0, 2.0):
        jaxckpt.save(tmp_path / f"{value}", {"a": jnp.float32(value), "b": jnp.float32(value)})
    one = jaxckpt.restore(tmp_path / "1.0", {"a": jnp.float32(0)})
    two = jaxckpt.restore(tmp_path / "2.0", {"a": jnp.float32(0)})
    one, two = (each.attach("b", jnp.float32(0)) for each in (one, two))
    assert one.tree == {"a": 1, "b": 1}
    assert two.tree == {"a": 2, "b": 2}
    over = jaxckpt.restore(tmp_path / "2.0", one.tree).tree
    assert over == {"a": 2, "b": 2}


def test_nothing_is_initialized_that_was_saved(tmp_path):
    """C9: a restore into shapes, and what is missing computed alone."""
    jaxckpt.save(tmp_path / "c", {"net": params()})
    ran: list[str] = []

    def init():
        ran.append("traced")
        callback = lambda: (ran.append("computed"), np.zeros((2, 3), np.float32))[1]
        kernel = jax.pure_callback(callback, jax.ShapeDtypeStruct((2, 3), "float32"))
        net = params(3.0)
        return {"net": {**net, "l1": {**net["l1"], "kernel": kernel}}, "head": jnp.full(4, 9.0)}

    abstract = jax.eval_shape(lambda: {"net": params(), "head": jnp.zeros(4)})
    with pytest.raises(jaxckpt.RestoreError, match="head"):
        jaxckpt.restore(tmp_path / "c", abstract)
    restored = jaxckpt.restore(tmp_path / "c", abstract, partial=True)
    with pytest.raises(jaxckpt.RestoreError, match="head"):
        restored.tree
    got = restored.initialize(init)
    assert_same(got.tree, {"net": params(), "head": jnp.full(4, 9.0)})
    assert ran == ["traced"]
    assert set(got.status.missing) == {"head"}
    jaxckpt.restore(tmp_path / "c", {"net": abstract["net"]}).initialize(init).tree
    assert "computed" not in ran


def test_all_problems_at_once_before_anything_is_read(tmp_path, monkeypatch):
    """C14, C15, C17: and nothing of the target has changed."""
    saved = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4), "d": jnp.ones(5), "it": CountIter(4)}
    jaxckpt.save(tmp_path / "c", saved)
    iterator = CountIter(0)
    target = {
        "a": jnp.zeros(2), "b": jnp.zeros(4), "c": jnp.zeros(4, jnp.bfloat16), "d": {"x": jnp.zeros(5)},
        "e": jnp.zeros(1), "it": iterator, "n": np.zeros(3),
    }  # fmt: skip
    monkeypatch.setattr(os, "preadv", lambda *arguments: pytest.fail("read a value"))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", target)
    found = {problem.key: problem.kind for problem in caught.value.problems}
    assert {key: found[key] for key in ("b", "c", "e", "n")} == {
        "b": "shape", "c": "dtype", "e": "missing", "n": "missing",
    }  # fmt: skip
    assert [kind for key, kind in found.items() if key.startswith("d")] == ["kind"]
    assert len(found) == 5
    assert all(key in str(caught.value) for key in found)
    assert "bfloat16[4]" in str(caught.value)
    assert iterator.position == 0


def test_unknown_dimensions_are_refused(tmp_path):
    """C16."""
    jaxckpt.save(tmp_path / "c", {"a": jnp.ones((2, 3))})
    with pytest.raises((jaxckpt.RestoreError, TypeError, ValueError)):
        jaxckpt.restore(tmp_path / "c", {"a": jax.ShapeDtypeStruct((None, 3), "float32")}).tree
    with pytest.raises((jaxckpt.RestoreError, TypeError, ValueError)):
        jaxckpt.restore(tmp_path / "c", {"a": jax.ShapeDtypeStruct((-1, 3), "float32")}).tree


@pytest.mark.parametrize(
    ("saved", "target", "fits"),
    [(jnp.float32, jnp.bfloat16, True), (jnp.bfloat16, jnp.float32, True), (jnp.int32, jnp.int8, True),
     (jnp.int32, jnp.float32, False), (jnp.float32, jnp.int32, False), (jnp.bool_, jnp.int32, False),
     (jnp.uint8, jnp.int32, True), (jnp.float32, jnp.complex64, False)],
)  # fmt: skip
def test_another_dtype_has_to_be_asked_for(tmp_path, saved, target, fits):
    """C17: `cast` opts in, and keeps floats floats."""
    jaxckpt.save(tmp_path / "c", {"a": jnp.ones(3, saved)})
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", {"a": jnp.zeros(3, target)}, partial=True)
    assert [problem.kind for problem in caught.value.problems] in (["dtype"], ["kind"])
    if not fits:
        with pytest.raises(jaxckpt.RestoreError):
            jaxckpt.restore(tmp_path / "c", {"a": jnp.zeros(3, target)}, cast=True)
        return
    for cast in (True, ("a",), ("**",)):
        got, status = jaxckpt.restore(tmp_path / "c", {"a": jnp.zeros(3, target)}, cast=cast)
        assert_same(got, {"a": jnp.ones(3, target)})
        assert set(status.cast) == {"a"}


def test_a_cast_that_would_lose_an_integer(tmp_path):
    """C17."""
    jaxckpt.save(tmp_path / "c", {"a": jnp.array([1, 300]), "b": jnp.array([-1]), "n": 2**40})
    for target in ({"a": jnp.zeros(2, jnp.int8)}, {"b": jnp.zeros(1, jnp.uint32)}, {"n": jnp.int32(0)}):
        with pytest.raises(jaxckpt.RestoreError):
            jaxckpt.restore(tmp_path / "c", target, cast=True)


@pytest.mark.parametrize(
    ("saved", "target"),
    [({"x": {"y": 1}}, {"x": 1}), ({"x": 1}, {"x": {"y": 1}}), ({"x": jnp.ones(2)}, {"x": [jnp.ones(2)]}),
     ({"x": [1, 2]}, {"x": 3.0}), ({"x": {}}, {"x": 1}), ({"x": 1}, {"x": {}}), ({"x": None}, {"x": 1}),
     ({"x": 1}, {"x": None}), ({"x": "1"}, {"x": 1}), ({"x": 1}, {"x": "1"}), ({"x": b"1"}, {"x": "1"}),
     ({"x": True}, {"x": 1}), ({"x": 1}, {"x": 1.0}), ({"x": CountIter()}, {"x": {"position": 0}}),
     ({"x": {"position": 0}}, {"x": CountIter()}), ({"x": 1}, {"x": jnp.ones(2)}), ({"x": jnp.ones(2)}, {"x": 1.0})],
)  # fmt: skip
@pytest.mark.parametrize("partial", [False, True])
def test_a_value_facing_a_container(tmp_path, saved, target, partial):
    """C19, C20: and values of other types."""
    jaxckpt.save(tmp_path / "c", saved)
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", target, partial=partial)
    (problem,) = caught.value.problems
    assert problem.kind in ("kind", "dtype", "shape")
    assert problem.key.split("/")[0] == "x"
    if "{" in str(saved) + str(target) and not isinstance(saved["x"], CountIter):
        assert problem.kind == "kind" or not isinstance(saved["x"], dict)


# D: slots


def test_a_slot_needs_both_and_its_key_says_so(tmp_path):
    """D1, D2."""
    report = jaxckpt.save(tmp_path / "c", trained(ADAM))
    assert report.slots == 8
    found = [key for key in keys(tmp_path / "c") if ".OPTIMIZER_SLOT" in key]
    assert sorted(found) == sorted(
        f"net/{layer}/{name}/.OPTIMIZER_SLOT/optimizer/{slot}"
        for layer in ("l1", "l2") for name in ("kernel", "bias") for slot in ("mu", "nu")
    )  # fmt: skip


def test_two_optimizers_on_one_variable(tmp_path):
    """D3."""
    saved = {**trained(ADAM), "second": trained(optax.adamw(1e-3), steps=5)["optimizer"]}
    jaxckpt.save(tmp_path / "c", saved)
    assert {"net/l1/bias/.OPTIMIZER_SLOT/optimizer/mu", "net/l1/bias/.OPTIMIZER_SLOT/second/mu"} <= set(
        keys(tmp_path / "c")
    )
    target = {**fresh(ADAM), "second": optax.adamw(1e-3).init(params())}
    assert_same(jaxckpt.restore(tmp_path / "c", target).assert_consumed().tree, saved)


@pytest.mark.parametrize(
    "order",
    [
        ("net", "optimizer"),
        ("optimizer", "net"),
        ("optimizer", "net/l2", "net/l1"),
        ("net/l1", "optimizer", "net/l2"),
    ],
)
def test_optimizer_first_or_variable_first(tmp_path, order):
    """D6: the slots come as soon as both are there."""
    saved, target = trained(ADAM), fresh(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    restored = jaxckpt.restore(tmp_path / "c", {})
    for key in order:
        value = target
        for name in key.split("/"):
            value = value[name]
        restored = restored.attach(key, value)
    restored.assert_consumed().assert_existing_objects_matched()
    assert_same(restored.tree, saved)


def test_optimizer_or_parameter_absent(tmp_path):
    """D8: not consumed, and everything that exists is matched."""
    saved = trained(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    part = {"l1": {"kernel": jnp.zeros((2, 3))}}
    for target in ({"net": zeros(params())}, {"net": part, "optimizer": ADAM.init(part)}):
        got, status = jaxckpt.restore(tmp_path / "c", target)
        status.assert_existing_objects_matched()
        with pytest.raises(jaxckpt.RestoreAssertionError, match="l2/kernel"):
            status.assert_consumed()
        assert same_bits(got["net"]["l1"]["kernel"], saved["net"]["l1"]["kernel"])
    assert same_bits(got["optimizer"][0].mu["l1"]["kernel"], saved["optimizer"][0].mu["l1"]["kernel"])


def test_slots_are_never_made(tmp_path):
    """D10: an Adam checkpoint, a program without moments."""
    jaxckpt.save(tmp_path / "c", trained(ADAM))
    for optimizer in (optax.sgd(1e-2), optax.sgd(1e-2, momentum=0.9)):
        target = fresh(optimizer)
        got, status = jaxckpt.restore(tmp_path / "c", target, partial=True)
        assert_same(got["optimizer"], target["optimizer"])
        assert len(status.slots_unused) == 8


def test_skipped_slots_are_excused(tmp_path):
    """D15."""
    jaxckpt.save(tmp_path / "c", trained(ADAM))
    jaxckpt.restore(tmp_path / "c", fresh(ADAM), skip_slots=True).status.assert_consumed()
    got = jaxckpt.restore(tmp_path / "c", {"net": params()}, skip_slots=True)
    got.assert_existing_objects_matched()
    assert_same(got.tree["net"], trained(ADAM)["net"])


# E: containers


@pytest.mark.parametrize("key", ["listed/2", "mapped/new", "listed/1/deep"])
def test_appending_and_setting(tmp_path, key):
    """E3, E4."""
    saved = {"listed": [jnp.ones(1), {"deep": jnp.ones(2)}, jnp.ones(3)], "mapped": {"new": jnp.ones(4)}}
    jaxckpt.save(tmp_path / "c", saved)
    value = {"listed/2": 3, "mapped/new": 4, "listed/1/deep": 2}[key]
    start = jaxckpt.restore(tmp_path / "c", {"listed": [], "mapped": {}}).attach("listed/0", jnp.zeros(1))
    if key == "listed/2":
        start = start.attach("listed/1", {"deep": jnp.zeros(2)})
    got = start.attach(key, jnp.zeros(value))
    got.assert_existing_objects_matched()
    assert key in got.status.restored
    assert isinstance(got.tree["listed"], list)
    with pytest.raises(ValueError, match="listed"):
        got.attach("listed/7", jnp.zeros(1))


def test_a_list_that_was_reordered_still_saves(tmp_path):
    """E5: there is nothing to poison."""
    listed = [jnp.ones(1), jnp.ones(2)]
    jaxckpt.save(tmp_path / "c", {"x": listed})
    listed.reverse()
    jaxckpt.save(tmp_path / "c", {"x": listed}, overwrite=True)
    del listed[0]
    jaxckpt.save(tmp_path / "c", {"x": listed}, overwrite=True)
    assert_same(jaxckpt.restore(tmp_path / "c").tree, {"x": [jnp.ones(1)]})


@pytest.mark.parametrize(
    "mapping",
    [
        {1: 1.0, 2: 2.0},
        {True: 1.0, False: 2.0},
        {1.5: 1.0, -0.25: 2.0},
        {b"x": 1.0},
        {10: 1.0, 9: 2.0},
        {-1: 1.0},
    ],
    ids=repr,
)
def test_keys_that_are_no_strings(tmp_path, mapping):
    """E12: saved with their type."""
    tree = {"x": jax.tree.map(lambda value: jnp.full(2, value), mapping)}
    jaxckpt.save(tmp_path / "c", tree)
    assert_same(jaxckpt.restore(tmp_path / "c").tree, tree)
    assert [type(key) for key in jaxckpt.restore(tmp_path / "c").tree["x"]] == [
        type(key) for key in sorted(mapping)
    ]
    assert_same(jaxckpt.restore(tmp_path / "c", zeros(tree)).assert_consumed().tree, tree)


def test_one_beside_its_spelling(tmp_path):
    """E12: an integer key beside a string of the same spelling."""
    tree = {"x": collections.OrderedDict([(1, jnp.ones(2)), ("1", jnp.full(2, 2.0)), (2, jnp.full(2, 3.0))])}
    jaxckpt.save(tmp_path / "c", tree)
    assert set(keys(tmp_path / "c")) == {"x/.N1", "x/1", "x/2"}
    for got in (jaxckpt.restore(tmp_path / "c", zeros(tree)), jaxckpt.restore(tmp_path / "c")):
        assert_same(got.tree, tree)
        assert list(got.tree["x"]) == [1, "1", 2]


@pytest.mark.parametrize(
    "empty", [{}, [], (), None, optax.EmptyState(), collections.OrderedDict(), {"a": {"b": [{}]}}], ids=repr
)
def test_empty_containers(tmp_path, empty):
    """E17: they fail no assertion, and they are restored."""
    jaxckpt.save(tmp_path / "c", {"x": empty, "y": 1})
    got = (
        jaxckpt.restore(tmp_path / "c", {"x": empty, "y": 0})
        .assert_consumed()
        .assert_existing_objects_matched()
    )
    assert got.tree == {"x": empty, "y": 1}
    assert set(got.status.restored) == {"y"}
    without = jaxckpt.restore(tmp_path / "c").tree
    assert type(without["x"]) is type(empty)
    assert without == {"x": empty, "y": 1}


# H: assertions


def test_assertions_name_ten_keys_and_the_number_of_the_rest(tmp_path):
    """H1 to H3."""
    jaxckpt.save(tmp_path / "c", {f"k{place:02}": place for place in range(25)})
    restored = jaxckpt.restore(tmp_path / "c", {"k00": 0, "new": 3}, partial=True)
    with pytest.raises(jaxckpt.RestoreAssertionError, match=r"(?s)k01.* 14 more") as caught:
        restored.assert_consumed()
    assert "k11" not in str(caught.value)
    with pytest.raises(jaxckpt.RestoreAssertionError, match="new"):
        restored.assert_existing_objects_matched()
    restored.assert_nontrivial_match()
    with pytest.raises(AssertionError):
        jaxckpt.restore(tmp_path / "c", {"new": 1}, partial=True).status.assert_nontrivial_match()


def test_the_status_after_an_attach_is_the_new_ones(tmp_path):
    """H4."""
    jaxckpt.save(tmp_path / "c", {"a": 1, "b": 2})
    first = jaxckpt.restore(tmp_path / "c", {"a": 0})
    second = first.attach("b", 0).assert_consumed()
    assert second.tree == {"a": 1, "b": 2}
    with pytest.raises(jaxckpt.RestoreAssertionError, match="b"):
        first.assert_consumed()
    assert set(first.status.unused) == {"b"}
    assert not second.status.unused


@pytest.mark.parametrize(
    "name", ["assert_consumed", "assert_existing_objects_matched", "assert_nontrivial_match"]
)
def test_assertions_on_no_checkpoint(name):
    """H5."""
    with pytest.raises(jaxckpt.RestoreAssertionError, match=r"(?i)no checkpoint"):
        getattr(jaxckpt.restore(None, {"a": 1}).status, name)()


def test_warnings_come_up_front_or_not_at_all(tmp_path):
    """H7: an incomplete restore that somebody looked at is silent; one that nobody looked at is not."""
    jaxckpt.save(tmp_path / "c", {"a": 1, "b": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree, status = jaxckpt.restore(tmp_path / "c", {"a": 0})
        del tree, status
        gc.collect()
    with pytest.warns(jaxckpt.RestoreIgnoredWarning, match="tree, status"):
        jaxckpt.restore(tmp_path / "c", {"a": 0})


# I: iterators


class Torchlike:
    """The other spelling of an iterator's state."""

    def __init__(self, position=0):
        self.position = position

    def state_dict(self):
        return {"position": self.position, "rng": np.arange(self.position), "nested": [{"x": "text"}]}

    def load_state_dict(self, state):
        assert list(state["nested"]) == [{"x": "text"}]
        self.position = state["position"]


def test_an_object_with_a_state(tmp_path):
    """I9: either spelling; asked once; set after everything else."""
    one, other = CountIter(3), Torchlike(5)
    jaxckpt.save(tmp_path / "c", {"one": one, "other": other, "w": jnp.ones(2)})
    assert one.asked == 1
    reader = jaxckpt.load_checkpoint(tmp_path / "c")
    assert reader["one"] == {"position": 3}
    assert "one" not in reader.get_variable_to_shape_map()
    targets = CountIter(), Torchlike()
    got, status = jaxckpt.restore(tmp_path / "c", {"one": targets[0], "other": targets[1], "w": jnp.zeros(2)})
    assert (got["one"], got["other"]) == targets
    assert (targets[0].position, targets[1].position) == (3, 5)
    assert set(status.restored) == {"one", "other", "w"}
    untouched = CountIter()
    with pytest.raises(jaxckpt.RestoreError):
        jaxckpt.restore(tmp_path / "c", {"one": untouched, "w": jnp.zeros(3)})
    assert untouched.position == 0


def test_the_data_goes_on_where_it_was(tmp_path):
    """I10: and what was taken between the save and the crash comes again."""
    batches = CountIter()
    [next(batches) for _ in range(7)]
    jaxckpt.save(tmp_path / "c", {"data": batches})
    rest = [next(batches) for _ in range(5)]
    again = jaxckpt.restore(tmp_path / "c", {"data": CountIter(100)}).tree["data"]
    for (x, y), (a, b) in zip(rest, [next(again) for _ in range(5)], strict=True):
        assert same_bits(x, a)
        assert same_bits(y, b)
