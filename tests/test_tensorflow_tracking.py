"""TensorFlow's habits that are kept, or bettered: slots, containers, assertions, iterators.

The ids are those of the study of its behaviour.
"""

from __future__ import annotations

import collections
import gc
import warnings

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
