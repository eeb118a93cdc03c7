"""The status of a restore: frozen, and TensorFlow's assertions on it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from jaxckpt.errors import RestoreAssertionError
from jaxckpt.graph.status import RestoreStatus

FULL = RestoreStatus(restored={"a": ("a",), "b": ("c",)})


def test_assertions_that_hold_give_the_status_back():
    assert FULL.assert_consumed() is FULL
    assert FULL.assert_existing_objects_matched() is FULL
    assert FULL.assert_nontrivial_match() is FULL
    assert FULL.expect_partial() is FULL


def test_consumed_names_ten_and_how_many_more():
    status = RestoreStatus(restored={"a": ("a",)}, unused=tuple(f"x/{i}" for i in range(13)))
    with pytest.raises(RestoreAssertionError, match="13 saved values") as info:
        status.assert_consumed()
    text = str(info.value)
    assert "x/9" in text
    assert "x/10" not in text
    assert "and 3 more" in text
    assert dataclasses.replace(status, excused=frozenset(status.unused)).assert_consumed()


def test_ambiguous_fails_both():
    status = RestoreStatus(
        ambiguous=("m",), candidates={"m": ("m", "m.2")}, unused=("m.2",), excused=frozenset({"m.2"})
    )
    for check in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(RestoreAssertionError, match="m"):
            check()


def test_missing_fails_existing_and_fresh_does_not():
    with pytest.raises(RestoreAssertionError, match="w"):
        RestoreStatus(missing=("w",)).assert_existing_objects_matched()
    assert RestoreStatus(fresh=("w",)).assert_existing_objects_matched()


def test_trivial_match():
    with pytest.raises(RestoreAssertionError, match="nothing in the target"):
        RestoreStatus(missing=("w",), unused=("v",)).assert_nontrivial_match()


def test_no_checkpoint():
    status = RestoreStatus.nothing(["a", "b"])
    assert status.missing == ("a", "b")
    for check in (
        status.assert_consumed,
        status.assert_existing_objects_matched,
        status.assert_nontrivial_match,
    ):
        with pytest.raises(RestoreAssertionError, match="No checkpoint specified"):
            check()
    assert status.expect_partial() is status
    assert "nothing restored" in repr(status)


def test_frozen():
    source = {"a": ("a",)}
    status = RestoreStatus(restored=source)
    source["b"] = ("b",)
    assert dict(status.restored) == {"a": ("a",)}
    with pytest.raises(TypeError):
        status.restored["b"] = ("b",)  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.missing = ()  # pyright: ignore


def test_copies_and_pickles():
    status = RestoreStatus(restored={"a": ("a",)}, replaced={"a": (1, 2)}, unused=("u",))
    assert copy.deepcopy(status) == status == pickle.loads(pickle.dumps(status))
    assert hash(status) == hash(copy.copy(status))


def test_shows_itself():
    status = RestoreStatus(
        restored={"a": ("b",), "cfg": ("cfg",)},
        missing=("<m>",),
        replaced={"cfg": (False, True)},
        unused=("u",),
    )
    assert repr(status) == "<RestoreStatus: 2 restored, 1 missing, 1 unused>"
    text = str(status)
    assert "from b" in text
    assert "False -> True" in text
    page = status._repr_html_()
    assert "&lt;m&gt;" in page
    assert "<table" in page
    many = RestoreStatus(unused=tuple(str(i) for i in range(50)))
    assert "40 more" in str(many)
    assert len(str(many).splitlines()) < 20
