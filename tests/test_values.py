"""Reads by location: whole chunks, each checked before a byte of it is used."""

import errno
import math
import os
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.errors import CorruptCheckpointError
from jaxckpt.storage import values
from jaxckpt.storage.chunks import INLINE, ROW, ChunkTable, chunk_slices, digest
from jaxckpt.storage.values import Request, ValueReader


def write(directory, arrays, chunk_shapes, *, files=2, inline=(), gap=0):
    """Lays arrays down as a database would, and makes their table."""
    os.makedirs(directory / "d", exist_ok=True)
    blobs, rows, tail = [bytearray() for _ in range(files)], [], bytearray()
    for entry, (array, chunk_shape) in enumerate(zip(arrays, chunk_shapes, strict=True)):
        for chunk, place in enumerate(chunk_slices(array.shape, chunk_shape)):
            data = np.ascontiguousarray(array[place]).tobytes()
            if entry in inline:
                rows.append((entry, chunk, INLINE, len(tail), len(data), digest(data)))
                tail += data
            else:
                file = (entry + chunk) % files
                blobs[file] += b"-" * gap
                rows.append((entry, chunk, file, len(blobs[file]), len(data), digest(data)))
                blobs[file] += data
    for i, blob in enumerate(blobs):
        (directory / "d" / f"f{i}").write_bytes(blob)
    names = tuple(f"d/f{i}" for i in range(files))
    return ChunkTable(files=names, rows=np.array(rows, ROW), inline=bytes(tail))


def ask(arrays, chunk_shapes, **more):
    return [
        Request(entry=i, chunk_shape=c, shape=a.shape, dtype=a.dtype, **more)
        for i, (a, c) in enumerate(zip(arrays, chunk_shapes, strict=True))
    ]


ARRAYS = [
    np.arange(12, dtype="f4").reshape(3, 4),
    np.array(7, "i8"),
    np.zeros((0, 5), "f4"),
    np.arange(300_000, dtype="f8").reshape(300, 1000),
    np.arange(60, dtype="i2").reshape(3, 4, 5).astype(ml_dtypes.bfloat16),
    np.array(["ab", "cde"], "<U3"),
    np.arange(6, dtype=np.uint8).reshape(2, 3).astype(ml_dtypes.int4),
]
CHUNKS = [(3, 4), (), (1, 5), (100, 1000), (1, 2, 5), (2,), (1, 2)]


@pytest.mark.parametrize("gap", [0, 7, 5000])
@pytest.mark.parametrize("inline", [(), (1, 5, 6)])
def test_values_come_back_writable_and_whole(tmp_path, gap, inline):
    table = write(tmp_path, ARRAYS, CHUNKS, gap=gap, inline=inline)
    with ValueReader(str(tmp_path), [table]) as reader:
        for got, want in zip(reader.read_many(ask(ARRAYS, CHUNKS)), ARRAYS, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert got.tobytes() == want.tobytes()
            assert got.flags.writeable
            assert got.flags.c_contiguous
        out = np.empty((300, 1000))
        assert reader.read(3, (100, 1000), (300, 1000), out.dtype, out) is None
        assert (out == ARRAYS[3]).all()
        small = np.empty((3, 4), "f4")
        assert reader.read(0, (3, 4), (3, 4), small.dtype, small) is None
        assert (small == ARRAYS[0]).all()


def test_entries_of_several_tables_meet_in_one_reader(tmp_path):
    table = write(tmp_path, ARRAYS, CHUNKS, inline=(1,))
    halves = [
        ChunkTable(files=table.files, rows=table.rows[::2], inline=table.inline),
        ChunkTable(files=table.files, rows=table.rows[1::2], inline=table.inline),
    ]
    got = ValueReader(str(tmp_path), halves).read_many(ask(ARRAYS, CHUNKS))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, ARRAYS, strict=True))
    with pytest.raises(CorruptCheckpointError, match="chunks"):
        ValueReader(str(tmp_path), [table, table]).read_many(ask(ARRAYS, CHUNKS))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_region_is_that_part_of_the_array(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunk = tuple(data.draw(st.integers(1, length)) for length in shape)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    region = tuple(slice(a, b) for a, b in bounds)
    array = np.arange(math.prod(shape), dtype="i4").reshape(shape)
    directory = tmp_path_factory.mktemp("region")
    table = write(directory, [array], [chunk])
    request = Request(entry=0, chunk_shape=chunk, shape=shape, dtype=array.dtype, region=region)
    with ValueReader(str(directory), [table]) as reader:
        got = reader.read_many([request])[0]
        assert got.shape == array[region].shape
        assert (got == array[region]).all()
        assert (reader.read(0, chunk, shape, array.dtype) == array).all()


def test_damage_names_the_leaves_and_the_files(tmp_path):
    table = write(tmp_path, ARRAYS, CHUNKS, inline=(1,))
    names = [(f"leaf{i}", f"alias{i}") for i in range(len(ARRAYS))]
    (row,) = np.flatnonzero((table.rows["leaf"] == 4) & (table.rows["chunk"] == 3))
    file, offset = table.files[int(table.rows["file"][row])], int(table.rows["offset"][row])
    data = bytearray((tmp_path / file).read_bytes())
    data[offset] ^= 1
    (tmp_path / file).write_bytes(data)
    with ValueReader(str(tmp_path), [table], names.__getitem__) as reader:
        with pytest.raises(CorruptCheckpointError, match="leaf4") as caught:
            reader.read_many(ask(ARRAYS, CHUNKS))
        assert caught.value.keys == ("leaf4", "alias4")
        assert caught.value.files == (file,)
        whole = [request for request in ask(ARRAYS, CHUNKS) if request.entry != 4]
        assert len(reader.read_many(whole)) == len(whole)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_no_flipped_bit_of_the_data_is_ever_returned(tmp_path_factory, where, bit):
    directory = tmp_path_factory.mktemp("flip")
    arrays, chunks = ARRAYS[:2] + ARRAYS[4:], CHUNKS[:2] + CHUNKS[4:]
    table = write(directory, arrays, chunks, files=1)
    path = directory / "d" / "f0"
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with ValueReader(str(directory), [table]) as reader, pytest.raises(CorruptCheckpointError):
        reader.read_many(ask(arrays, chunks))


def test_cut_off_missing_and_strange_files_are_damage(tmp_path):
    table = write(tmp_path, ARRAYS, CHUNKS, files=1)
    path = tmp_path / "d" / "f0"
    whole = path.read_bytes()
    big, small = ask(ARRAYS, CHUNKS)[3], ask(ARRAYS, CHUNKS)[6]
    for request in (big, small):
        path.write_bytes(whole[:-1] if request is small else whole[:1000])
        with pytest.raises(CorruptCheckpointError, match="cut off"):
            ValueReader(str(tmp_path), [table]).read_many([request])
    os.unlink(path)
    with pytest.raises(CorruptCheckpointError, match="missing") as caught:
        ValueReader(str(tmp_path), [table]).read_many([big, small])
    assert caught.value.files == ("d/f0",)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)  # a pipe must not make the reader wait for a writer
        with pytest.raises(CorruptCheckpointError, match="missing"):
            ValueReader(str(tmp_path), [table]).read_many([big])


def test_a_file_cut_off_after_opening_is_damage(tmp_path):
    table = write(tmp_path, ARRAYS, CHUNKS, files=1)
    with ValueReader(str(tmp_path), [table]) as reader:
        os.truncate(tmp_path / "d" / "f0", 40)
        for request in (ask(ARRAYS, CHUNKS)[3], ask(ARRAYS, CHUNKS)[6]):
            with pytest.raises(CorruptCheckpointError):
                reader.read_many([request])


def test_other_errors_of_the_file_system_are_no_damage(tmp_path, monkeypatch):
    table = write(tmp_path, ARRAYS, CHUNKS)
    reader = ValueReader(str(tmp_path), [table])

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    for request in ask(ARRAYS, CHUNKS)[:4:3]:
        with pytest.raises(OSError, match="Input/output"):
            reader.read_many([request])


def test_what_was_opened_outlives_the_checkpoint(tmp_path):
    table = write(tmp_path, ARRAYS, CHUNKS)
    reader = ValueReader(str(tmp_path), [table])
    for name in table.files:
        os.unlink(tmp_path / name)
    got = reader.read_many(ask(ARRAYS, CHUNKS))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, ARRAYS, strict=True))
    reader.close()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        reader.read_many(ask(ARRAYS, CHUNKS))


def test_more_files_than_may_be_open_are_opened_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "OPEN_FILES", 2)
    table = write(tmp_path, ARRAYS, CHUNKS, files=6)
    got = ValueReader(str(tmp_path), [table]).read_many(ask(ARRAYS, CHUNKS))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, ARRAYS, strict=True))


def test_claims_larger_than_the_files_allocate_nothing(tmp_path):
    table = write(tmp_path, ARRAYS, CHUNKS)
    reader = ValueReader(str(tmp_path), [table])
    huge = Request(entry=0, chunk_shape=(1, 1), shape=(10**9, 10**9), dtype=np.dtype("f8"))
    with pytest.raises(CorruptCheckpointError, match="chunks"):
        reader.read_many([huge])
    rows = np.array([(0, 0, 0, 0, 8 << 50, b"x" * 16)], ROW)
    lying = ValueReader(str(tmp_path), [ChunkTable(files=("d/f0",), rows=rows)])
    for shape in ((1 << 50,), (1 << 40, 1 << 10)):
        with pytest.raises(CorruptCheckpointError, match="cut off"):
            lying.read(0, shape, shape, np.dtype("f8"))
    swapped = np.array([(0, c, 0, c, n, digest(b"")) for c, n in ((0, 5), (1, 3))], ROW)
    with pytest.raises(CorruptCheckpointError, match="instead of 4 bytes"):
        ValueReader(str(tmp_path), [ChunkTable(files=("d/f0",), rows=swapped)]).read(
            0, (1,), (2,), np.dtype("f4")
        )


def test_large_reads_use_threads_and_report_their_damage(tmp_path):
    arrays = [np.full(3 << 20, i, "f4") for i in range(4)]
    chunks = [(1 << 20,)] * 4
    table = write(tmp_path, arrays, chunks)
    with ValueReader(str(tmp_path), [table]) as reader:
        got = reader.read_many(ask(arrays, chunks))
        assert all((a == b).all() for a, b in zip(got, arrays, strict=True))
        with open(tmp_path / "d" / "f1", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        with pytest.raises(CorruptCheckpointError, match="differs from its digest"):
            reader.read_many(ask(arrays, chunks))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    table = write(tmp_path, ARRAYS, CHUNKS)
    real = os.preadv

    def some(handle, buffers, offset):
        first = memoryview(buffers[0])
        return real(handle, [first[: max(1, len(first) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", some)
    got = ValueReader(str(tmp_path), [table]).read_many(ask(ARRAYS, CHUNKS))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, ARRAYS, strict=True))


def test_nothing_here_imports_jax():
    import subprocess

    code = "import jaxckpt.storage.manifest, jaxckpt.storage.values, jaxckpt.storage.format.orbax_files, jaxckpt.storage.directory, sys; print([m for m in ('jax', 'orbax', 'tensorstore') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
