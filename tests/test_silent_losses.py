"""What TensorFlow's checkpoints lose without a word, and jaxckpt does not. The ids are those of the study of it."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import time
import warnings
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import assert_same, grads, same_bits, trained, zeros

import jaxckpt

ADAM = optax.adam(1e-2)


# A4: attributes that are plain values are ignored


@flax.struct.dataclass
class Holder:
    """An object with attributes of every kind."""

    number: Any
    rate: Any
    name: Any
    data: Any
    table: Any


@pytest.mark.parametrize(
    "make", [lambda **kw: Holder(**kw), lambda **kw: jaxckpt.Checkpoint(**kw), dict, lambda **kw: [kw]]
)
def test_plain_values_as_attributes(tmp_path, make):
    values = {
        "number": 3, "rate": 0.5, "name": "run", "data": np.arange(3),
        "table": collections.defaultdict(int, a=1)
    }  # fmt: skip
    jaxckpt.save(tmp_path / "c", make(**values))
    other = {
        "number": 0, "rate": 0.0, "name": "", "data": np.zeros(3, int),
        "table": collections.defaultdict(int, a=0)
    }  # fmt: skip
    got = (
        jaxckpt.restore(tmp_path / "c", make(**other))
        .assert_consumed()
        .assert_existing_objects_matched()
        .tree
    )
    assert_same(got, make(**values))


class Plain:
    """No pytree: JAX sees one opaque leaf."""


@pytest.mark.parametrize(
    "value",
    [{1, 2}, frozenset("a"), Plain(), (n for n in range(3)), open, np.random.default_rng(0), np.array([None, 1]), range(3),
     {"x": 1}.keys(), np.array(["a"], dtype=object), memoryview(b"x"), sys, collections.deque([1])],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize(
    "make", [lambda value: {"a": {"b": [value]}}, lambda value: jaxckpt.Checkpoint(a={"b": [value]})]
)
def test_what_cannot_be_saved_says_where_it_is(tmp_path, make, value):
    if value is open:  # an open file; as a function it would be program
        value = sys.stdout
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="a/b/0"):
        jaxckpt.save(tmp_path / "c", make(value))
    assert os.listdir(tmp_path) == []


# A6: an attribute replaced by a number, or deleted, still saves the old variable


@pytest.mark.parametrize("replaced", [7, "seven", np.arange(7), {"deeper": jnp.ones(7)}])
def test_edges_are_those_of_the_moment_of_the_save(tmp_path, replaced):
    tree = {"v": jnp.ones(2), "gone": jnp.ones(3)}
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        manager.save(tree)
        tree["v"] = replaced
        del tree["gone"]
        manager.save(tree)
        manager.wait()
        first, second = map(jaxckpt.load_checkpoint, manager.checkpoints)
    assert set(first) == {"v", "gone"}
    assert set(second) == {"v/deeper" if isinstance(replaced, dict) else "v"}
    assert_same(jaxckpt.restore(second).tree, {"v": replaced})


def test_a_replaced_edge_of_a_checkpoint(tmp_path):
    one = jaxckpt.Checkpoint(v=jnp.ones(2), w=jnp.ones(2))
    two = one.replace(v=5)
    paths = [ckpt.save(tmp_path / "ckpt") for ckpt in (one, two, one)]
    assert [type(jaxckpt.load_checkpoint(path)["v"]) for path in paths] == [np.ndarray, int, np.ndarray]
    assert_same(one.v, jnp.ones(2))


# B8, F11: numbers come from what was restored, so that a rewind or a new manager overwrites


def test_a_rewind_overwrites_nothing(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        for value in (1.0, 2.0, 3.0):
            manager.save({"x": jnp.float32(value)})
        manager.wait()
        with pytest.warns(jaxckpt.NewerCheckpointsWarning, match="3"):
            got, _ = manager.restore({"x": jnp.float32(0)}, step=1)
        assert got["x"] == 1
        assert manager.save(got).result().path.endswith("ckpt-4")
        assert manager.steps == [1, 2, 3, 4]
        assert manager.latest_checkpoint.endswith("ckpt-4")
        assert manager.restore({"x": jnp.float32(0)}).tree["x"] == 1
    values = [jaxckpt.load_checkpoint(tmp_path / f"ckpt-{n}")["x"] for n in (1, 2, 3, 4)]
    assert values == [1, 2, 3, 1]


def test_a_rewind_by_hand_overwrites_nothing(tmp_path):
    make = lambda value: jaxckpt.Checkpoint(x=jnp.float32(value))
    paths = [make(value).save(tmp_path / "ckpt") for value in (1, 2, 3)]
    back = make(0).restore(paths[0]).tree
    assert back.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-4")
    assert [jaxckpt.load_checkpoint(path)["x"] for path in paths] == [1, 2, 3]


def test_a_new_manager_overwrites_nothing(tmp_path):
    """It restores nothing, and still goes on above what is there and what was there."""
    for run in range(3):
        with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
            assert manager.save({"x": run}).result().path.endswith(f"ckpt-{2 * run + 1}")
            assert manager.save({"x": run}).result().path.endswith(f"ckpt-{2 * run + 2}")
            if run == 1:
                manager.delete(4)
                assert manager.steps == [3] or manager.steps == []
    assert jaxckpt.CheckpointManager(tmp_path).steps == [6]


def test_a_deleted_highest_number_is_not_used_again(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        for _ in range(3):
            manager.save({"x": 1})
        manager.wait()
        manager.delete(3)
        assert manager.save({"x": 2}).result().path.endswith("ckpt-4")
    shutil.rmtree(tmp_path / "ckpt-4")  # by somebody else
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        assert manager.save({"x": 2}).result().path.endswith("ckpt-5")


def test_a_manager_and_saves_by_hand_share_their_numbers(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        manager.save({"x": 1}).result()
        assert jaxckpt.Checkpoint(x=2).save(tmp_path / "ckpt").endswith("ckpt-2")
        assert manager.save({"x": 3}).result().path.endswith("ckpt-3")
    assert [jaxckpt.load_checkpoint(tmp_path / f"ckpt-{n}")["x"] for n in (1, 2, 3)] == [1, 2, 3]


def test_an_existing_step_is_not_overwritten(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        manager.save({"x": 1}, step=5)
        with pytest.raises(jaxckpt.CheckpointExistsError, match="overwrite"):
            manager.save({"x": 2}, step=5)
        manager.wait()
        assert jaxckpt.load_checkpoint(manager.latest_checkpoint)["x"] == 1
        manager.save({"x": 3}, step=5, overwrite=True).result()
        assert jaxckpt.load_checkpoint(manager.latest_checkpoint)["x"] == 3
        assert manager.steps == [5]


# I3, I4: asynchronous saves reorder numbers, or take one twice


def test_asynchronous_saves_keep_their_numbers(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        futures = [manager.save({"x": value, "w": np.full(1 << 17, value)}) for value in range(1, 7)]
        assert len({future.path for future in futures}) == 6
        reports = [future.result() for future in futures]
        assert [report.path for report in reports] == manager.checkpoints
        assert manager.steps == [1, 2, 3, 4, 5, 6]
        assert [manager.info(step).sequence for step in manager.steps] == sorted(
            {manager.info(step).sequence for step in manager.steps}
        )
    for value in range(1, 7):
        reader = jaxckpt.load_checkpoint(tmp_path / f"ckpt-{value}")
        assert reader["x"] == value
        assert (reader["w"] == value).all()


def test_a_rewind_amid_an_asynchronous_save(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        manager.save({"x": 1, "w": np.zeros(4)}).result()
        pending = manager.save({"x": 2, "w": np.zeros(1 << 20)})
        with warnings.catch_warnings(action="ignore", category=jaxckpt.NewerCheckpointsWarning):
            back, _ = manager.restore({"x": 0, "w": np.zeros(4)}, step=1)
        later = manager.save(back)
        assert pending.result().path.endswith("ckpt-2")
        assert later.result().path.endswith("ckpt-3")
        assert manager.latest_checkpoint.endswith("ckpt-3")
    assert [jaxckpt.load_checkpoint(tmp_path / f"ckpt-{n}")["x"] for n in (1, 2, 3)] == [1, 2, 1]


def test_changes_after_the_call_do_not_reach_the_checkpoint(tmp_path):
    tree = {
        "host": np.ones(1 << 18),
        "list": [1, 2],
        "donated": jnp.ones(1 << 18),
        "ref": jax.new_ref(jnp.ones(3)),
    }
    future = jaxckpt.save_async(tmp_path / "c", tree)
    tree["host"][:] = -1
    tree["list"].append(3)
    tree["ref"][...] = jnp.zeros(3)
    jax.jit(lambda x: x * 2, donate_argnums=0)(tree["donated"]).block_until_ready()
    future.result()
    reader = jaxckpt.load_checkpoint(tmp_path / "c")
    assert (reader["host"] == 1).all()
    assert (reader["donated"] == 1).all()
    assert (reader["ref"] == 1).all()
    assert "list/2" not in reader


# B12: restoring a path that is no checkpoint restores nothing


@pytest.mark.parametrize(
    "name", ["c.index", "c/graph.json", "c/d", "c-1", "", "c/graph", "other", "c.data-00000-of-00001", "file"]
)
def test_a_path_that_is_no_checkpoint_raises(tmp_path, name):
    jaxckpt.save(tmp_path / "c", {"x": jnp.ones(1)})
    (tmp_path / "file").write_text("hello")
    for target in ({"x": jnp.zeros(1)}, None):
        with pytest.raises(jaxckpt.CheckpointError) as caught:
            jaxckpt.restore(tmp_path / name, target)
        if not (tmp_path / name).exists():
            assert isinstance(caught.value, jaxckpt.CheckpointNotFoundError)


def test_the_message_names_what_is_there(tmp_path):
    jaxckpt.Checkpoint(x=1).save(tmp_path / "ckpt")
    with pytest.raises(jaxckpt.CheckpointNotFoundError, match="ckpt-1"):
        jaxckpt.restore(tmp_path / "ckpt", {"x": 0})
    with pytest.raises(jaxckpt.CheckpointError, match="ckpt-1"):  # a directory of checkpoints is none itself
        jaxckpt.restore(tmp_path, {"x": 0})


# C10: what is pending reads what lies there later, or nothing


def test_pending_values_are_those_of_what_was_opened(tmp_path):
    save = lambda value: jaxckpt.save(
        tmp_path / "c", {"a": jnp.full(3, value), "b": {"k": jnp.full(300_000, value)}}, overwrite=True
    )
    save(1.0)
    pending = jaxckpt.restore(tmp_path / "c", {"a": jnp.zeros(3)})
    save(2.0)
    after = pending.attach("b", {"k": jnp.zeros(300_000)})
    assert (after.tree["b"]["k"] == 1).all()
    assert (after.tree["a"] == 1).all()


def test_pending_values_of_a_deleted_checkpoint(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        manager.save({"a": jnp.ones(3), "b": jnp.ones(300_000), "s": "text"}).result()
        pending = manager.restore({"a": jnp.zeros(3)})
        manager.save({"a": jnp.zeros(3)}).result()  # prunes the one that was opened
        assert manager.steps == [2]
        after = pending.attach("b", jnp.zeros(300_000)).attach("s", "").assert_consumed()
    assert (after.tree["b"] == 1).all()
    assert after.tree["s"] == "text"


# C11, C12: sharing that differs between checkpoint and program


def test_saved_as_one_restored_as_two(tmp_path):
    tied = jnp.arange(6.0)
    jaxckpt.save(tmp_path / "c", {"embed": tied, "head": tied, "more": [tied]})
    target = {"embed": jnp.zeros(6), "head": jnp.zeros(6), "more": [jnp.zeros(6)]}
    got = jaxckpt.restore(tmp_path / "c", target).assert_consumed().assert_existing_objects_matched().tree
    assert_same(got, {"embed": tied, "head": tied, "more": [tied]})
    assert got["embed"] is not got["head"]
    alone, status = jaxckpt.restore(tmp_path / "c", {"head": jnp.zeros(6)})
    assert same_bits(alone["head"], tied)
    status.assert_consumed()  # every node was restored, if under one name


def test_saved_as_two_restored_as_one(tmp_path):
    jaxckpt.save(tmp_path / "c", {"embed": jnp.full(6, 1.0), "head": jnp.full(6, 2.0)})
    one = jnp.zeros(6)
    got = jaxckpt.restore(tmp_path / "c", {"embed": one, "head": one}).assert_consumed().tree
    assert (got["embed"] == 1).all()
    assert (got["head"] == 2).all()


def test_sharing_with_moments(tmp_path):
    """A slot belongs to a name of its variable, so that untying the program loses no moment."""
    tied = jnp.arange(6.0)
    net = {"embed": tied, "head": tied}
    saved = {"net": net, "opt": trained(ADAM, {k: v + 0 for k, v in net.items()})["optimizer"]}
    jaxckpt.save(tmp_path / "c", saved)
    target = {"net": zeros(net), "opt": ADAM.init(net)}
    assert_same(jaxckpt.restore(tmp_path / "c", target).assert_consumed().tree, saved)
    untied = {"net": {k: v + 0 for k, v in net.items()}, "opt": saved["opt"]}
    jaxckpt.save(tmp_path / "d", untied)
    assert set(jaxckpt.load_checkpoint(tmp_path / "d")) == set(jaxckpt.load_checkpoint(tmp_path / "c"))
    one = jnp.zeros(6)
    got = jaxckpt.restore(tmp_path / "d", {"net": {"embed": one, "head": one}, "opt": ADAM.init(net)})
    assert_same(got.assert_consumed().tree, saved)


# C18: an error of a deferred restore is swallowed by a list or a dict


@pytest.mark.parametrize(
    ("key", "wrong", "kind"),
    [("listed/1", jnp.zeros(5), "shape"), ("mapped/k", jnp.zeros(5), "shape"), ("mapped/k", jnp.zeros(3, jnp.float16), "dtype"),
     ("mapped/deep/er", jnp.zeros(1), "shape"), ("mapped", {"k": jnp.zeros(4)}, "shape"), ("mapped/k", 3, "kind"),
     ("mapped/deep", jnp.zeros(3), "kind"), ("mapped/k", {"x": jnp.zeros(3)}, "kind")],
)  # fmt: skip
def test_a_deferred_mismatch_raises(tmp_path, key, wrong, kind):
    saved = {"listed": [jnp.ones(3), jnp.ones(3)], "mapped": {"k": jnp.ones(3), "deep": {"er": jnp.ones(2)}}}
    jaxckpt.save(tmp_path / "c", saved)
    restored = jaxckpt.restore(tmp_path / "c", {"listed": [], "mapped": {}}).attach("listed/0", jnp.zeros(3))
    before = restored.tree
    with pytest.raises(jaxckpt.RestoreError) as caught:
        restored.attach(key, wrong)
    assert {problem.kind for problem in caught.value.problems} == {kind}
    assert all(problem.key.startswith(key) for problem in caught.value.problems)
    assert_same(restored.tree, before)


# D13: moments are kept by position, and swap when parameters of one shape are reordered


class OneWay(NamedTuple):
    """Parameters in one order."""

    first: Any
    second: Any
    third: Any


class OtherWay(NamedTuple):
    """The same in another."""

    third: Any
    first: Any
    second: Any


def ordered(names, source=None):
    """An OrderedDict keeps its own order, where a dict is sorted by JAX."""
    return collections.OrderedDict(
        (name, source[name] if source else jnp.full(3, float(len(name)))) for name in names
    )


CONTAINERS = [
    (lambda v: ordered(v, v), lambda v: ordered(reversed(v), v)),
    (lambda v: ordered(v, v), dict),
    (lambda v: OneWay(**v), lambda v: OtherWay(**v)),
    (lambda v: OneWay(**v), dict),
    (dict, lambda v: OtherWay(**v)),
    (lambda v: ordered(v, v), lambda v: jaxckpt.Checkpoint(**v)),
]


@pytest.mark.parametrize(("before", "after"), CONTAINERS)
@pytest.mark.parametrize("optimizer", [ADAM, optax.sgd(1e-2, momentum=0.9)])
def test_moments_follow_names_not_positions(tmp_path, before, after, optimizer):
    values = {"first": jnp.full(3, 1.0), "second": jnp.full(3, 2.0), "third": jnp.full(3, 3.0)}
    saved = trained(optimizer, before(values))
    jaxckpt.save(tmp_path / "c", saved)
    net = after(zeros(values))
    got = jaxckpt.restore(tmp_path / "c", {"net": net, "optimizer": optimizer.init(net)})
    got.assert_consumed().assert_existing_objects_matched()
    field = lambda tree, name: tree[name] if isinstance(tree, dict) else getattr(tree, name)
    pairs = [(saved["net"], got.tree["net"])]
    old, new = saved["optimizer"][0], got.tree["optimizer"][0]
    pairs += [(getattr(old, slot), getattr(new, slot)) for slot in old._fields if slot != "count"]
    for old, new in pairs:
        for name in values:
            assert same_bits(field(old, name), field(new, name)), name


def test_training_goes_on_the_same_in_another_order(tmp_path):
    net = ordered(["aa", "b", "cccc"])
    saved = trained(ADAM, net)
    jaxckpt.save(tmp_path / "c", saved)
    turned = ordered(["cccc", "aa", "b"], zeros(net))
    got = jaxckpt.restore(tmp_path / "c", {"net": turned, "optimizer": ADAM.init(turned)}).tree
    gradient = grads(saved["net"], 9)
    here, _ = ADAM.update(gradient, saved["optimizer"])
    there, _ = ADAM.update(ordered(turned, gradient), got["optimizer"])
    assert_same(dict(there), dict(here))


# J4, J5: a killed save, a flipped bit


KILLED = """
import sys, numpy as np, jaxckpt
with jaxckpt.CheckpointManager(sys.argv[1]) as manager:
    manager.save({"w": np.zeros(4)}).result()
    print("saving", flush=True)
    for value in range(100):
        manager.save({"w": np.full(4 << 20, float(value))}, step=2, overwrite=value > 0).result()
"""


def test_the_leavings_of_a_killed_save_are_swept(tmp_path):
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / ".hidden").write_text("mine too")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert child.stdout.readline() == b"saving\n"
        known = {"checkpoint", "ckpt-1", "ckpt-2", "mine.tmp", ".hidden", ".jaxckpt"}
        deadline = time.monotonic() + 60
        while not set(os.listdir(tmp_path)) - known:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    left = set(os.listdir(tmp_path)) - known
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        assert manager.steps in ([1], [1, 2])
        manager.save({"w": np.ones(4)}).result()
        names = set(os.listdir(tmp_path))
        assert not left & names
        assert names <= known | {f"ckpt-{manager.steps[-1]}"}
        assert {"mine.tmp", ".hidden", "ckpt-1"} <= names


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_and_the_key_named(tmp_path):
    tree = {"net": {"kernel": jnp.arange(1000.0), "bias": jnp.arange(500.0)}}
    jaxckpt.save(tmp_path / "c", tree)
    kernel = np.asarray(tree["net"]["kernel"]).tobytes()
    for name in os.listdir(tmp_path / "c" / "d"):
        data = (tmp_path / "c" / "d" / name).read_bytes()
        if kernel in data:
            flip(tmp_path / "c" / "d" / name, data.index(kernel) + 1234)
    with pytest.raises(jaxckpt.CorruptCheckpointError, match="net/kernel") as caught:
        jaxckpt.restore(tmp_path / "c", zeros(tree))
    assert caught.value.keys == ("net/kernel",)
    reader = jaxckpt.load_checkpoint(tmp_path / "c")
    with pytest.raises(jaxckpt.CorruptCheckpointError):
        reader["net/kernel"]
    np.testing.assert_array_equal(reader["net/bias"], tree["net"]["bias"])
    got, _ = jaxckpt.restore(tmp_path / "c", {"net": {"bias": jnp.zeros(500)}})
    assert same_bits(got["net"]["bias"], tree["net"]["bias"])


@pytest.mark.parametrize("name", ["graph.json", "chunks.process_0"])
def test_a_flipped_bit_in_what_describes_the_values(tmp_path, name):
    tree = {"w": jnp.arange(10.0), "s": "text", "n": 12345}
    jaxckpt.save(tmp_path / "good", tree)
    size = (tmp_path / "good" / name).stat().st_size
    for place in np.linspace(0, size - 1, 40).astype(int):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "c")
        flip(tmp_path / "c" / name, int(place))
        with pytest.raises((jaxckpt.CorruptCheckpointError, jaxckpt.UnsupportedFormatError)):
            jaxckpt.restore(tmp_path / "c", zeros(tree))
