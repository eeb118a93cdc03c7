"""Inserting into immutable trees."""

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple

import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.graph.grow import grow, unescape
from jaxckpt.graph.model import escape

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Module:
    kernel: object = None
    bias: object = None


@given(st.text())
def test_unescape_is_the_reverse_of_escape(name):
    assert unescape(escape(name)) == name


@given(st.text(), st.text())
def test_no_two_names_are_spelled_alike(a, b):
    assert (escape(a) == escape(b)) == (a == b)
    assert "/" not in escape(a)
    assert escape(a) != "."


@pytest.mark.parametrize(
    ("tree", "key", "grown"),
    [
        ({"a": 1}, "b", {"a": 1, "b": 9}),
        ({"a": {"b": 1}}, "a/c/d", {"a": {"b": 1, "c": {"d": 9}}}),
        ({"a": None}, "a", {"a": 9}),
        ({"a": None}, "a/b", {"a": {"b": 9}}),
        ({"a": [1]}, "a/1", {"a": [1, 9]}),
        ({"a": (1,)}, "a/1", {"a": (1, 9)}),
        ({"a": [{"b": 1}]}, "a/0/c", {"a": [{"b": 1, "c": 9}]}),
        ({3: {"b": 1}}, "3/c", {3: {"b": 1, "c": 9}}),
        ({"a.b": {"c": 1}}, "a..b/d", {"a.b": {"c": 1, "d": 9}}),
        (OrderedDict(a=1), "b", OrderedDict(a=1, b=9)),
        (FrozenDict(a=1), "b", FrozenDict(a=1, b=9)),
        (Pair(1, None), "right", Pair(1, 9)),
        (Module(1), "bias", Module(1, 9)),
        (None, "a/b", {"a": {"b": 9}}),
    ],
    ids=repr,
)
def test_grow(tree, key, grown):
    before = repr(tree)
    result = grow(tree, key.split("/"), 9)
    assert result == grown
    assert type(result) is type(grown)
    assert repr(tree) == before


def test_the_factory_of_a_defaultdict_stays():
    assert grow(defaultdict(list, a=[1]), ["b"], 9).default_factory is list


def test_mappings_are_merged():
    assert grow({"a": {"b": 1}}, ["a"], {"c": 2}) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("tree", "key", "message"),
    [
        ({"a": 1}, "a", "a: the tree has a int there already"),
        ({"a": {"b": 1}}, "a/b", "a/b: the tree has a int there already"),
        ({"a": [1]}, "a/3", "the next item is a/1"),
        ({"a": [1]}, "a/x", "a is a list of 1"),
        ({"a": Module(1)}, "a/other", "a is a Module, which cannot take another child"),
        (7, "a", "which cannot take another child"),
    ],
    ids=repr,
)
def test_what_cannot_grow_says_why(tree, key, message):
    with pytest.raises(ValueError, match=message):
        grow(tree, key.split("/"), 9)
