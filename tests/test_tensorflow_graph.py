"""TensorFlow's habits that are kept, or bettered: names, saving, matching.

The ids are those of the study of its behaviour. What it loses in silence is in test_silent_losses.py, what
concerns directories in test_tensorflow_directories.py.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import CountIter, assert_same, params, same_bits, zeros

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
