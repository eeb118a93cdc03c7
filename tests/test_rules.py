"""Key patterns, and the options of a restore in one form."""

from __future__ import annotations

import numpy as np
import pytest

from jaxckpt.graph.matching.patterns import Pattern, Template, covering, normal
from jaxckpt.graph.matching.transforms import assembler, natural
from jaxckpt.graph.rules import Rules


@pytest.mark.parametrize(
    ("pattern", "key", "names"),
    [
        ("net", "net", True),
        ("net", "net/l1/k", True),
        ("net", "network", False),
        ("net/l", "net/l1", False),
        ("net/*", "net/l1/k", True),
        ("net/*", "net", False),
        ("net/**", "net", True),
        ("net/**/k", "net/k", True),
        ("net/**/k", "net/a/b/k", True),
        ("net/**/k", "net/a/b/kk", False),
        ("**", ".", True),
        ("**", "a/b", True),
        ("**/mu", "net/w/.OPTIMIZER_SLOT/opt/mu", True),
        ("net/w/*", "net/w/.OPTIMIZER_SLOT/opt/mu", False),  # a star stands for no mark
        ("net/w", "net/w/.OPTIMIZER_SLOT/opt/mu", True),
        ("net/layer_*/k", "net/layer_12/k", True),
        ("net/layer_*/k", "net/layer/k", False),
        (".", "a", True),
        (".", ".", True),
        ("/net/", "net/k", True),
        ("net/k/.ATTRIBUTES/VARIABLE_VALUE", "net/k", True),
        ("opt/S.1/c", "opt/S/c", True),
        ("a..1", "a..1", True),  # the name "a.1", escaped
    ],
)
def test_pattern_names_a_leaf_or_what_is_below(pattern, key, names):
    found = Pattern.of(pattern, "fresh")
    assert found.covers(key) is names
    combined = covering([Pattern.of("zzz", "fresh"), found])
    assert combined is not None
    assert (combined.match("" if key == "." else "/" + key) is not None) is names


@pytest.mark.parametrize(
    ("source", "target", "key", "new"),
    [
        ("a", "b", "a/x", "b/x"),
        ("a/*/c", "b/*", "a/1/c/d", "b/1/d"),
        ("*/x/*", "*/*/x", "p/x/q", "p/q/x"),
        ("**/old", "**/new", "a/b/old/c", "a/b/new/c"),
        ("layers_*", "layers/*", "layers_3/k", "layers/3/k"),
        ("a/**/k", "**", "a/b/c/k", "b/c"),
        ("a", ".", "a/x", "x"),
        (".", "net", "a", "net/a"),
        (".", "net", ".", "net"),
    ],
)
def test_template_takes_what_the_stars_stood_for(source, target, key, new):
    pattern = Pattern.of(source, "rename")
    found = pattern.find(key)
    assert found is not None
    assert Template.of(target, pattern, "rename").fill(pattern, found.stars, found.rest) == new


def test_a_star_in_a_saved_name_is_not_filled_again():
    pattern = Pattern.of("a/*/*", "rename")
    found = pattern.find("a/*/b")
    assert found is not None
    assert Template.of("*/x/*", pattern, "rename").fill(pattern, found.stars, found.rest) == "*/x/b"


def test_more_stars_on_the_right_are_refused():
    with pytest.raises(ValueError, match="more '\\*' than 'a'"):
        Rules.of(rename={"a": "b/*"})


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="empty name"):
        normal("a//b", "rename")


@pytest.mark.parametrize(
    "options",
    [
        {"rename": ["a"]},
        {"rename": {1: "a"}},
        {"rename": {"a": 1}},
        {"fresh": 3},
        {"fresh": (3,)},
        {"partial": (None,)},
        {"transform": ["a"]},
        {"transform": {"a": "b"}},
        {"transform": {"a": ("b", "c")}},
        {"transform": {"a": ((), np.stack)}},
        {"transform": {"a": (3, np.stack)}},
    ],
)
def test_options_of_another_form_are_refused(options):
    with pytest.raises(TypeError):
        Rules.of(**options)


def test_one_string_is_one_pattern():
    rules = Rules.of(fresh="net/head", partial="a", cast="b", at="/x/")
    assert [p.text for p in rules.fresh] == ["net/head"]
    assert rules.at == "x"
    assert Rules.of(at=".").at == ""


def test_natural_order():
    assert sorted(["10", "9", "a10", "a2", "a"], key=natural) == ["9", "10", "a", "a2", "a10"]


def test_assembler_arguments():
    a, b, c = (np.full(2, i) for i in range(3))
    assert assembler(lambda x: x, [None], [], single=True)([a]) is a
    assert assembler(lambda x: len(x), [3], [], single=True)([a, b, c]) == 3
    assert assembler(lambda x, i: (i, x.sum()), [None], ["2"], single=True)([b]) == (2, 2)
    assert assembler(lambda x, i: i, [None], ["name"], single=True)([b]) == "name"
    assert (
        assembler(lambda q, k, v: (q is a, k is b, v is c), [None] * 3, [], single=False)([a, b, c])
        == (True,) * 3
    )
    assert assembler(lambda *xs: len(xs), [None] * 3, [], single=False)([a, b, c]) == 3
    assert assembler(np.concatenate, [None] * 3, [], single=False)([a, b, c]).shape == (6,)
    assert assembler(np.stack, [None] * 3, [], single=False)([a, b, c]).shape == (3, 2)
    gathered = assembler(lambda rows, one: (len(rows), one is c), [2, None], [], single=False)([a, b, c])
    assert gathered == (2, True)
