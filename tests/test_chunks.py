"""Grids, digests, dtypes and chunk tables."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.errors import CorruptCheckpointError, SaveError, UnsupportedFormatError
from jaxckpt.storage.chunks import (
    INLINE,
    NO_LEAF,
    ROW,
    TARGET_BYTES,
    ChunkTable,
    Keys,
    Located,
    build_table,
    chunk_counts,
    chunk_names,
    chunk_slices,
    digest,
    grid,
    leaf_digest,
)
from jaxckpt.storage.format.dtypes import ORBAX_DTYPES, dtype_name, element_bits, mask_sub_byte, numpy_dtype


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 8)), max_size=4),
    st.sampled_from([1, 2, 8, 1 << 18]),
)
def test_grid_divides_the_shard_along_its_leading_axes(axes, itemsize):
    shard = tuple(length for length, _ in axes)
    shape = tuple(length * parts for length, parts in axes)
    chunk = grid(shape, itemsize, shard)
    assert all(length % part == 0 for length, part in zip(shard, chunk, strict=True))
    partial = [axis for axis, part in enumerate(chunk) if part != shard[axis]]
    if partial:  # one axis is divided, those before it are single, those behind it whole
        assert all(part == 1 for part in chunk[: partial[-1]])
        assert math.prod(shard) * itemsize > TARGET_BYTES
        assert math.prod(chunk) * itemsize >= 1 << 20


@pytest.mark.parametrize(
    ("shape", "itemsize", "shard", "chunk"),
    [
        ((), 4, None, ()),
        ((0, 3), 4, None, (1, 3)),
        ((1000, 1000), 4, None, (1000, 1000)),
        ((100, 1024, 1024, 4), 4, None, (1, 1024, 1024, 4)),
        ((1 << 28,), 4, None, (1 << 22,)),
        ((1_000_003, 16), 4, None, (1_000_003, 16)),  # prime: one large chunk instead of a million tiny ones
        ((4096, 4096), 4, (512, 4096), (512, 4096)),
        ((3, 1 << 28), 4, None, (1, 1 << 22)),
    ],
)
def test_grid_of_known_shapes(shape, itemsize, shard, chunk):
    assert grid(shape, itemsize, shard) == chunk


def test_grid_refuses_a_shard_that_does_not_divide():
    with pytest.raises(ValueError, match="does not divide"):
        grid((10,), 4, (3,))
    with pytest.raises(ValueError, match="does not divide"):
        grid((10,), 4, (5, 1))


def test_chunks_cover_the_array_once_in_order():
    shape, chunk = (5, 6), (2, 3)
    seen = np.zeros(shape, int)
    for place in chunk_slices(shape, chunk):
        seen[place] += 1
    assert (seen == 1).all()
    assert chunk_names(shape, chunk) == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert chunk_names((), ()) == ["0"]
    assert len(chunk_slices((), ())) == 1
    assert chunk_slices((0, 3), (1, 3)) == [] == chunk_names((0, 3), (1, 3))
    assert chunk_counts((7,), (2,)) == (4,)


def test_digests_tell_order_and_content_apart():
    assert len(digest(b"")) == 16
    assert digest(b"a") != digest(b"b")
    assert leaf_digest([digest(b"a"), digest(b"b")]) != leaf_digest([digest(b"b"), digest(b"a")])
    assert digest(np.arange(4, dtype=np.uint8)) == digest(bytes(range(4)))


# dtypes


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.dtype(c) for c in "?bhilqBHILQefdFD"),
        *(np.dtype(s) for s in ("<U5", ">f4", ">i8", "<M8[ns]", "<m8[s]", "<M8", "|S3", "|V7", "<M8[25s]")),
        *(np.dtype(getattr(ml_dtypes, n)) for n in ("bfloat16", "int4", "uint2", "int1", "float6_e2m3fn")),
        *(np.dtype(getattr(ml_dtypes, n)) for n in ("float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu")),
    ],
)
def test_dtype_names_round_trip(dtype):
    assert numpy_dtype(dtype_name(dtype)) == dtype


@pytest.mark.parametrize(
    "name", ["O", "object", "|O", "f4,i4", "float13", "", "U" * 99, "<i3", "|V9999999999", "(2,)f4"]
)
def test_only_plain_dtypes_are_taken_from_a_file(name):
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        numpy_dtype(name)


@pytest.mark.parametrize("dtype", [np.dtype(object), np.dtype([("a", "f4")]), np.dtypes.StringDType()])
def test_what_is_no_plain_bytes_has_no_name(dtype):
    with pytest.raises(TypeError, match="cannot be saved"):
        dtype_name(dtype)


def test_orbax_dtypes_exist():
    assert all(dtype_name(numpy_dtype(name)) == name for name in ORBAX_DTYPES)


@pytest.mark.parametrize(
    "name", ["int4", "uint4", "int2", "uint2", "int1", "uint1", "float4_e2m1fn", "float6_e3m2fn"]
)
def test_high_bits_of_sub_byte_values_are_zeroed(name):
    bits, dtype = element_bits(name), numpy_dtype(name)
    low = np.arange(1 << bits, dtype=np.uint8).reshape(2, -1)
    dirty = (low | np.uint8(0xFF & ~((1 << bits) - 1))).view(dtype)
    assert (mask_sub_byte(dirty).view(np.uint8) == low).all()
    assert mask_sub_byte(dirty).shape == low.shape
    clean = low.view(dtype)
    assert mask_sub_byte(clean) is clean
    assert mask_sub_byte(np.ones(3)).dtype == np.float64
    assert mask_sub_byte(np.array(-1, numpy_dtype("int4"))).shape == ()


# tables


def small_table():
    rows = [
        (0, 0, 0, 0, 4, digest(b"aaaa")),
        (0, 1, 0, 4, 4, digest(b"bbbb")),
        (1, 0, INLINE, 2, 2, digest(b"cc")),
    ]
    return ChunkTable(
        files=("d/x", "d/é"), rows=np.array([*rows, (NO_LEAF, 0, 1, 0, 9, digest(b"z"))], ROW), inline=b"..cc"
    )


def test_a_table_round_trips():
    table = small_table()
    again = ChunkTable.decode(table.encode(), "chunks.process_0")
    assert again.files == table.files
    assert again.inline == table.inline
    assert (again.rows == table.rows).all()
    assert again.encode() == table.encode()
    assert table.uncovered({"d/x": 10, "d/é": 5}) == {"d/x": 2, "d/é": -4}
    empty = ChunkTable(files=(), rows=np.empty(0, ROW))
    assert len(ChunkTable.decode(empty.encode(), "t").rows) == 0


def test_every_flipped_byte_of_a_table_is_found():
    data = small_table().encode()
    for at, bit in itertools.product(range(len(data)), (1, 0x80)):
        damaged = bytearray(data)
        damaged[at] ^= bit
        with pytest.raises((CorruptCheckpointError, UnsupportedFormatError)):
            ChunkTable.decode(bytes(damaged), "t")
    for size in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            ChunkTable.decode(data[:size], "t")
    with pytest.raises(CorruptCheckpointError):
        ChunkTable.decode(data + b"x", "t")


ONE = (0, 0, 0, 0, 4, b"x" * 16)


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        (("../x",), [ONE]),
        (("/etc/passwd",), [ONE]),
        (("d/../../x",), [ONE]),
        (("d//x",), [ONE]),
        (("d/x", "d/x"), [ONE]),
        (("C:x",), [ONE]),
        (("d/x",), [ONE, (1, 0, 1, 0, 4, b"x")]),
        (("d/x",), [(0, 0, -2, 0, 4, b"x")]),
        (("d/x",), [(0, 0, INLINE, 0, 4, b"x")]),
        (("d/x",), [ONE, (0, 0, 0, 9, 4, b"x")]),
        (("d/x",), [ONE, (1, 0, 0, 3, 4, b"x")]),
        (("d/x",), [(0, 0, 0, (1 << 64) - 1, 4, b"x")]),
        (("d/x",), [(0, 0, 0, 0, (1 << 64) - 1, b"x")]),
    ],
)
def test_hostile_tables_are_refused(files, rows):
    data = ChunkTable(files=files, rows=np.array(rows, ROW)).encode()
    with pytest.raises(CorruptCheckpointError):
        ChunkTable.decode(data, "t")


def test_a_later_table_asks_for_an_upgrade():
    data = bytearray(small_table().encode()[:-16])
    data[8] = 2
    with pytest.raises(UnsupportedFormatError, match="upgrade jaxckpt"):
        ChunkTable.decode(bytes(data) + digest(bytes(data)), "t")


def located(*rows):
    keys, files, offsets, lengths, inline = map(list, zip(*rows, strict=True))
    names = tuple(sorted({name for name in files if name}))
    index = [names.index(name) if name else -1 for name in files]
    return Located(files=names, keys=keys, file=index, offset=offsets, length=lengths, inline=inline)


def test_a_table_is_built_from_what_lies_where():
    rows = [
        (b"a/.zarray", "d/1", 50, 300, None),  # an alias, listed before what it refers to
        (b"b/.zarray", "d/1", 50, 300, None),
        (b"b/0", "d/1", 0, 50, None),
        (b"c/0", "d/1", 0, 50, None),
        (b"s/0", None, 0, 3, b"abc"),
        (b"x/0", None, 0, 1, b"?"),  # a Python value for Orbax: in a tree node, and in no table
    ]
    keys = Keys(
        names=[row[0] for row in rows],
        leaf=np.array([NO_LEAF, NO_LEAF, 7, NO_LEAF, 9, NO_LEAF], np.uint32),
        chunk=np.array([0, 0, 2, 0, 0, 0], np.uint32),
        number=np.array([-1, -1, 1, -1, 0, -1]),
    )
    digests, others = [digest(b"abc"), digest(b"b"), digest(b"?")], {b"b/.zarray": digest(b"doc")}
    table = build_table(keys, located(*rows), digests, others)
    assert table.inline == b"abc"
    assert [(*map(int, list(row)[:5]), bytes(row[5])) for row in table.rows] == [
        (7, 2, 0, 0, 50, digest(b"b")),
        (9, 0, -1, 0, 3, digest(b"abc")),
        (NO_LEAF, 0, 0, 50, 300, digest(b"doc")),
    ]
    ChunkTable.decode(table.encode(), "t")
    with pytest.raises(SaveError, match=r"lacks 1 of the values written .*b'b/0'.* holds 1 others .*b'b/1'"):
        build_table(keys, located(*rows[:2], (b"b/1", "d/1", 0, 50, None), *rows[3:]), digests, others)
    with pytest.raises(SaveError, match=r"digest of b'a/\.zarray'"):
        build_table(keys, located(*rows), digests, {})
