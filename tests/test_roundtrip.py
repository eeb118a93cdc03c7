"""Every kind of tree and leaf through a real checkpoint: with a target, without one, through a dry run."""

import functools
import shutil
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import Counting, kinds

import jaxckpt

KINDS = kinds()


def bits(value):
    """A leaf as something to compare bit for bit, with its type."""
    if isinstance(value, jax.Ref):
        return ("ref", bits(value[...]))
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return (str(jax.random.key_impl(value)), bits(jax.random.key_data(value)))
        host = np.asarray(value)
        return ("jax", bool(value.weak_type), host.dtype.str, host.dtype.name, host.shape, host.tobytes())
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return (type(value).__name__, array.dtype.str, array.dtype.name, array.shape, array.tobytes())
    if isinstance(value, float):
        return ("float", value.hex())
    if hasattr(value, "get_state"):
        return (type(value), repr(value.get_state()))
    if hasattr(value, "state_dict"):
        return (type(value), repr(value.state_dict()))
    return (type(value), value)


def same_bits(a, b):
    return [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]


def blank(leaf):
    """A target for a leaf: its kind with another value."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.zeros_like(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
            )
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype)) if not leaf.weak_type else leaf
    if isinstance(leaf, np.ndarray):
        return np.zeros_like(leaf)
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int | float | complex) and not isinstance(leaf, np.generic):
        return type(leaf)(0)
    if isinstance(leaf, str | bytes) and not isinstance(leaf, np.generic):
        return type(leaf)()
    return leaf


@pytest.mark.filterwarnings("ignore::jaxckpt.SlotsLeftOutWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_target(tmp_path, kind):
    tree, other = KINDS[kind](), KINDS[kind]()
    report = jaxckpt.save(tmp_path / "a", tree)
    target = jax.tree.map(blank, other)
    result, status = jaxckpt.restore(tmp_path / "a", target, partial=report.slots_left_out > 0)
    assert jax.tree.structure(result) == jax.tree.structure(target)
    status.assert_consumed()
    if not report.slots_left_out:
        assert same_bits(result, tree)
        status.assert_existing_objects_matched()
    else:
        assert len(status.missing) == report.slots_left_out


@pytest.mark.filterwarnings("ignore::jaxckpt.SlotsLeftOutWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_target(tmp_path, kind):
    tree = KINDS[kind]()
    saved = [leaf.key for leaf in jaxckpt.object_graph(tree).leaves]
    jaxckpt.save(tmp_path / "a", tree)
    result, status = jaxckpt.restore(tmp_path / "a")
    status.assert_consumed()
    graph = jaxckpt.object_graph(result)
    values = {leaf.key for leaf in graph.leaves if leaf.kind not in ("skipped", "callable")}
    reader = jaxckpt.load_checkpoint(tmp_path / "a")
    if not reader.graph.left_out and not any(leaf.kind == "iterator" for leaf in reader.graph.leaves):
        assert [leaf.key for leaf in graph.leaves] == saved  # names stay, whatever the containers became
        assert values == set(reader)
    plain = (dict, list, tuple, OrderedDict)
    if jax.tree.structure(result) == jax.tree.structure(tree):
        kept = [
            (a, b)
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(result), strict=True)
            if b is not ...
        ]
        assert all(
            bits(a) == bits(b)
            for a, b in kept
            if not callable(a) and not hasattr(a, "state_dict") and not hasattr(a, "get_state")
        )
    if kind != "keys of many types":  # a tuple as a key cannot be made from its text
        assert type(result) is type(tree) or type(tree) not in plain


@pytest.mark.filterwarnings("ignore::jaxckpt.SlotsLeftOutWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_agrees(tmp_path, kind):
    tree = KINDS[kind]()
    jaxckpt.save(tmp_path / "a", tree)
    reader = jaxckpt.load_checkpoint(tmp_path / "a")
    shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    assert list(shapes) == sorted(shapes)
    for key in shapes:
        array = reader.get_tensor(key)
        assert list(array.shape) == shapes[key]
        assert array.dtype == dtypes[key]
    assert set(shapes) <= set(reader)
    assert jaxckpt.list_variables(tmp_path / "a") == list(shapes.items())
    # The reader's own target restores everything.
    if not reader.graph.left_out:
        try:
            result, status = jaxckpt.restore(reader, reader.target())
        except jaxckpt.RestoreError as error:  # 64 bits have no place in a jax.Array while x64 is off
            assert {problem.kind for problem in error.problems} == {"dtype"}
            assert any(np.dtype(dtypes[problem.key]).itemsize >= 8 for problem in error.problems)
        else:
            assert not status.missing
            del result


def test_sixty_kinds():
    assert len(KINDS) >= 60


# ---- any tree of them ----

LEAVES = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.tuples(
        st.sampled_from(["float32", "int64", "uint8", "bool", "complex64", "bfloat16", "int4"]),
        st.lists(st.integers(0, 4), max_size=3),
    ).map(lambda pair: (np.arange(np.prod(pair[1], dtype=int)) % 5).reshape(pair[1]).astype(pair[0])),
    st.lists(st.integers(0, 3), max_size=2).map(lambda shape: jnp.ones(shape)),
    st.none(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(st.integers(), inner, max_size=3),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_any_tree_comes_back(tree):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        jaxckpt.save(path, tree)
        for result in (jaxckpt.restore(path, tree).tree, jaxckpt.restore(path).tree):
            assert jax.tree.structure(result) == jax.tree.structure(tree)
            assert same_bits(result, tree)


@settings(max_examples=40, deadline=None)
@given(TREES, st.data())
def test_conservation_for_any_change_of_the_target(tree, data):
    """restored + missing + fresh + ambiguous are the target's values; restored + unused + ambiguous the saved ones."""
    tree = {"root": tree, "x": jnp.ones(2)}
    target = {"root": data.draw(TREES) if data.draw(st.booleans()) else tree["root"], "x": jnp.zeros(2)}
    if data.draw(st.booleans()):
        target["new"] = jnp.zeros(1)
    with tempfile.TemporaryDirectory() as folder:
        jaxckpt.save(Path(folder) / "a", tree)
        reader = jaxckpt.load_checkpoint(Path(folder) / "a")
        fresh = ("x",) if data.draw(st.booleans()) else ()
        rename = {"x": "new"} if "new" in target and data.draw(st.booleans()) else None
        try:
            status = reader.match(target, fresh=fresh, rename=rename)
        except jaxckpt.RestoreError as error:
            assert error.problems or rename
            assert len({problem.key for problem in error.problems}) == len(error.problems)
            return
        wanted = [leaf.key for leaf in jaxckpt.object_graph(target).leaves]
        sides = [*status.restored, *status.missing, *status.fresh, *status.ambiguous]
        assert sorted(sides) == sorted(wanted)
        saved = [key for sources in status.restored.values() for key in sources]
        assert sorted([*saved, *status.unused]) == sorted(reader)


def test_collisions_of_the_storage_keys(tmp_path):
    x, y = jnp.ones(2), jnp.zeros(3)
    report = jaxckpt.save(tmp_path / "a", {"a.b": x, "a": {"b": y}})
    reader = jaxckpt.load_checkpoint(tmp_path / "a")
    assert (reader["a..b"] == 1).all()
    assert reader["a/b"].shape == (3,)
    assert len(report.hidden_from_orbax) == 1


@functools.cache
def deep(depth):
    tree = jnp.ones(1)
    for index in range(depth):
        tree = {f"n{index % 3}": tree}
    return tree


def test_deep_trees(tmp_path):
    tree = deep(300)
    jaxckpt.save(tmp_path / "a", tree)
    assert same_bits(jaxckpt.restore(tmp_path / "a", tree).tree, tree)


def test_a_removed_directory_is_not_missed(tmp_path):
    jaxckpt.save(tmp_path / "a", {"w": np.arange(1000)})
    reader = jaxckpt.load_checkpoint(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert (reader["w"] == np.arange(1000)).all()


def test_an_iterators_state_is_asked_for_once(tmp_path):
    iterator = Counting(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxckpt.save(tmp_path / "a", {"a": iterator, "b": iterator})
    assert iterator.asked == 1
