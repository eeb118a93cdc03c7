"""Which entries a graph has, and how Orbax spells its places."""

import math

import graphs
import numpy as np
import pytest
from graphs import Empty, Shared, make
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from jaxckpt.graph.model import (
    ArraySpec,
    CallableSpec,
    IteratorSpec,
    Name,
    Sharding,
    SkippedSpec,
    Structure,
    ValueSpec,
)
from jaxckpt.storage.chunks import chunk_counts
from jaxckpt.storage.format.spelling import DICT, SEQUENCE, orbax_name, places
from jaxckpt.storage.layout import (
    INLINE_BYTES,
    bytes_value,
    layout,
    names,
    orbax_values,
    prefix,
    value_bytes,
)
from jaxckpt.storage.plan import make_plan

F32 = ArraySpec(shape=(2, 3), dtype="float32")
INT = ValueSpec(type="int", value=3)


def keys(tree):
    return [entry.key for entry in layout(make(tree))]


def seen(tree):
    return {place.names: place.type for place in places(make(tree))}


def test_keys_are_paths_joined_by_dots():
    assert keys({"a": F32, "b": [F32, {"c.d": F32}]}) == ["a", "b.0", "b.1.c.d"]
    assert keys(F32) == [""]
    assert seen(F32) == {(): "np.ndarray"}
    assert prefix("") == ""
    assert prefix("a.b") == "a.b/"
    assert [p.types for p in places(make({"b": [F32, {"c": F32}]}))] == [
        (DICT, SEQUENCE),
        (DICT, SEQUENCE, DICT),
    ]


def test_of_two_places_of_one_spelling_the_later_one_is_hidden():
    tree = {"a": {"b": F32}, "a.b": replace(F32, dtype="int32")}
    first, second = layout(make(tree))
    assert (first.key, first.visible, first.raw) == ("a.b", True, False)
    assert (second.key, second.visible, second.raw) == (".jaxckpt/0", False, True)
    assert list(seen(tree)) == [("a", "b")]
    # 1 and "1" meet in the same step, whatever is below them
    assert keys({1: F32, "1": {"x": F32}}) == ["1", ".jaxckpt/0"]


@pytest.mark.parametrize(
    "dtype", ["uint4", "uint2", "int1", "float6_e2m3fn", "float8_e4m3", "<U5", ">f4", "<M8[ns]", "|S3"]
)
def test_what_zarr_has_no_name_for_is_raw(dtype):
    (entry,) = layout(make({"a": replace(F32, dtype=dtype)}))
    assert (entry.key, entry.raw, entry.visible, entry.dtype) == (".jaxckpt/0", True, False, dtype)


def test_keys_that_would_break_orbax_are_hidden():
    assert keys({"a/": F32}) == [".jaxckpt/0"]  # the same array as "a" to tensorstore
    assert keys({"\ud800": F32}) == [".jaxckpt/0"]
    assert keys({".jaxckpt/0": F32, "z": replace(F32, dtype="uint4")}) == [".jaxckpt/0", ".jaxckpt/1"]
    assert keys({"a/b": F32, "": F32, "/": F32, "..": F32}) == ["a/b", "", ".jaxckpt/0", ".."]
    assert keys({"a": ArraySpec(shape=(1,) * 33, dtype="int8")}) == [".jaxckpt/0"]


def test_lists_have_no_holes_for_orbax():
    call = CallableSpec(name="relu")
    assert seen({"l": [call, F32]}) == {("l", "0"): "None", ("l", "1"): "np.ndarray"}
    assert seen({"l": [{"f": call}, F32]}) == {("l", "0"): "None", ("l", "1"): "np.ndarray"}
    assert seen({"l": [[call, call], F32]}) == {
        ("l", "0", "0"): "None",
        ("l", "0", "1"): "None",
        ("l", "1"): "np.ndarray",
    }
    assert seen({"d": {"f": call, "w": F32}}) == {("d", "w"): "np.ndarray"}
    assert seen([SkippedSpec(), IteratorSpec(state=make([F32]))]) == {("0",): "None", ("1",): "None"}


def test_empty_containers_and_values_have_orbaxs_types():
    tree = {
        "d": {},
        "l": [],
        "t": (),
        "n": None,
        "s": Empty("namedtuple"),
        "o": Empty("object"),
        "i": INT,
        "f": ValueSpec(type="float", value=0.5),
        "b": ValueSpec(type="bool", value=True),
        "c": ValueSpec(type="complex", value=1j),
        "x": ValueSpec(type="str", value="text"),
        "y": ValueSpec(type="bytes", value=b"bytes"),
        "huge": ValueSpec(type="int", value=1 << 64),
        "a/b": ValueSpec(type="str", value="not through a JSON pointer"),
        "sur": ValueSpec(type="str", value="\ud800"),
    }
    got = {".".join(path): type_ for path, type_ in seen(tree).items()}
    assert got == {
        "d": "Dict",
        "l": "List",
        "t": "Tuple",
        "n": "None",
        "s": "None",
        "o": "None",
        "i": "scalar",
        "f": "scalar",
        "b": "scalar",
        "c": "scalar",
        "x": "string",
    }
    graph = make(tree)
    values = orbax_values(graph, places(graph))
    assert values.strings == (("x", "text"),)
    assert {key: array.dtype.name for key, array in values.arrays} == {
        "i": "int64",
        "f": "float64",
        "b": "bool",
        "c": "complex128",
    }
    assert all(array.shape == () for _, array in values.arrays)
    big = make({"u": ValueSpec(type="int", value=(1 << 64) - 1)})
    assert orbax_values(big, places(big)).arrays[0][1].dtype == np.uint64


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        (Name(name="0", type="index", text="0"), ("0", SEQUENCE)),
        (Name(name="a..b", type="str", text="a.b"), ("a.b", DICT)),
        (Name(name="", type="attr", text="value"), ("value", DICT)),
        (Name(name="3", type="int", text="3"), ("3", DICT)),
        (Name(name="1..5", type="float", text=(1.5).hex()), ("1.5", DICT)),
        (Name(name="x", type="bytes", text="eHk="), ("b'xy'", DICT)),
        (Name(name="None", type="none", text="None"), ("None", DICT)),
        (Name(name="True", type="bool", text="True"), ("True", DICT)),
    ],
)
def test_steps_are_spelled_as_orbax_does(name, spelled):
    assert orbax_name(name) == spelled


def test_a_transparent_step_still_stands_in_orbaxs_path():
    graph = make({"a": F32})
    box = Structure(
        type="object",
        cls="m:Box",
        names=(Name(name="", type="attr", text="value"),),
        children=graph.structure.children,
    )
    graph = replace(graph, structure=replace(graph.structure, children=(box,)))
    assert [place.names for place in places(graph)] == [("a", "value")]
    assert layout(graph)[0].key == "a.value"
    assert names(graph, layout(graph)[0]) == ("a",)


def test_a_shared_array_is_one_entry_with_an_alias_for_orbax():
    weight = Shared(F32)
    (entry, other) = layout(make({"a": weight, "b": [weight, F32], "c": weight}))
    assert (entry.owner, entry.aliases, entry.key, entry.alias_keys) == ((0,), (1, 3), "a", ("b.0", "c"))
    assert other.owner == (2,)
    graph = make({"a": weight, "b": [weight]})
    assert names(graph, layout(graph)[0]) == ("a", "b/0")
    # where only a later name is visible the array lies there
    (_, entry) = layout(make({"a": {"b": F32}, "a.b": weight, "z": weight}))
    assert (entry.key, entry.alias_keys, entry.visible) == ("z", (), True)


def test_iterators_keep_their_arrays_and_long_values_apart():
    long = ValueSpec(type="bytes", value=b"x" * (INLINE_BYTES + 1))
    short = ValueSpec(type="bytes", value=b"x" * INLINE_BYTES)
    inner = make({"deep": F32})
    state = make({"rng": F32, "buffer": long, "small": short, "inner": IteratorSpec(state=inner)})
    graph = make(
        {"it": IteratorSpec(state=state), "w": F32, "text": replace(long, type="str", value="é" * 40_000)}
    )
    got = layout(graph)
    assert [entry.owner for entry in got] == [(0, 0), (0, 1), (0, 3, 0), (1,), (2,)]
    assert [entry.key for entry in got] == [".jaxckpt/0", ".jaxckpt/1", ".jaxckpt/2", "w", ".jaxckpt/3"]
    assert [entry.raw for entry in got] == [True, True, True, False, True]
    assert [names(graph, entry)[0] for entry in got] == ["it/rng", "it/buffer", "it/inner/deep", "w", "text"]
    assert got[1].shape == (INLINE_BYTES + 1,)
    assert got[4].dtype == "uint8"


def test_values_in_the_database_round_trip():
    for value in ("é\ud800x", b"\0\xff"):
        spec = ValueSpec(type=type(value).__name__, value=value)
        assert bytes_value(spec.type, value_bytes(spec)) == value


def test_shards_and_keys_shape_the_grid():
    sharded = ArraySpec(shape=(8, 4), dtype="float32", sharding=Sharding(shard_shape=(2, 4)))
    key = ArraySpec(
        shape=(6,),
        dtype="uint32",
        array_type="key",
        impl="threefry2x32",
        key_shape=(2,),
        sharding=Sharding(shard_shape=(3,)),
    )
    a, b = layout(make([sharded, key]))
    assert a.chunk_shape == (2, 4)
    assert (b.shape, b.chunk_shape) == ((6, 2), (3, 2))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs.graphs)
def test_every_array_node_has_one_entry_and_every_key_is_one(graph):
    entries = layout(graph)
    assert entries == layout(graph)
    stored = [key for entry in entries for key in (entry.key, *entry.alias_keys)]
    assert len(set(stored)) == len(stored)
    arrays = {i for i, leaf in enumerate(graph.leaves) if leaf.kind == "array"}
    owned = [i for entry in entries if len(entry.owner) == 1 for i in (*entry.owner, *entry.aliases)]
    assert arrays <= set(owned)
    assert len(set(owned)) == len(owned)
    keys = make_plan(graph, with_values=False).keys
    counts = [math.prod(chunk_counts(entry.shape, entry.chunk_shape)) for entry in entries]
    assert keys.names == sorted(set(keys.names))
    assert sorted(keys.number[keys.number >= 0].tolist()) == list(range(sum(counts)))
    assert [np.count_nonzero(keys.leaf == i) for i in range(len(entries))] == counts
    assert all(
        entry.visible != entry.key.startswith(".jaxckpt/") and entry.raw != entry.visible for entry in entries
    )
    shown = places(graph)
    paths = [place.names for place in shown]
    assert len(set(paths)) == len(paths)
    assert not any(a != b and b[: len(a)] == a for a in paths for b in paths)  # a tree: no leaf holds another
    assert {place.key for place in shown if place.type == "np.ndarray"} == {
        k for k in stored if not k.startswith(".jaxckpt/")
    }
