import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from databases import array, locate, values, write
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.errors import CorruptCheckpointError, SaveError
from jaxckpt.storage import kv, kv_dump
from jaxckpt.storage.format import ocdbt
from jaxckpt.storage.format.dtypes import ORBAX_DTYPES, numpy_dtype
from jaxckpt.storage.plan import Item

ROOT = Path(kv.__file__).parents[2]


def files(directory):
    return {
        str(p.relative_to(directory)): p.stat().st_size for p in Path(directory).rglob("*") if p.is_file()
    }


def uncovered(directory):
    """Bytes of d/ that belong to no value."""
    located = {(v.file, v.offset, v.length) for v in locate(directory) if v.file}
    stored = sum(size for name, size in files(directory).items() if name.startswith("d/"))
    return stored - sum(length for _, _, length in located)


def read(directory, key):
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{directory}/", "path": f"{key}/"},
    }
    return ts.open(spec).result().read().result()


def value_of(directory, located):
    if located.inline is not None:
        return located.inline
    with open(Path(directory) / located.file, "rb") as file:
        file.seek(located.offset)
        return file.read(located.length)


def floats(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("name", sorted(ORBAX_DTYPES))
def test_every_dtype_of_zarr(name, tmp_path):
    dtype = numpy_dtype(name)
    for key, shape, chunks in (
        ("s", (6, 4), (3, 4)),
        ("z", (), ()),
        ("e", (0, 3), (1, 3)),
        ("b", (2, 1 << 20), (1, 1 << 20)),
    ):
        bits = np.random.default_rng(1).integers(0, 2, (*shape, dtype.itemsize), np.uint8)
        host = bits.view(dtype).reshape(shape) if bits.size else np.zeros(shape, dtype)
        directory = tmp_path / key
        directory.mkdir()
        write(directory, [array("a.b", host, chunks)])
        got = read(directory, "a.b")
        assert got.dtype == dtype
        assert got.shape == shape
        assert got.tobytes() == host.tobytes()
        chunk = [v for v in locate(directory) if not v.key.endswith(".zarray")]
        assert b"".join(value_of(directory, v) for v in chunk) == host.tobytes()
        assert uncovered(directory) == 0


def test_names_that_tensorstore_lacks():
    others = {n for n in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, n), type)} - ORBAX_DTYPES
    for name in others:
        dtype = getattr(ml_dtypes, name)
        if issubclass(dtype, np.generic):
            with pytest.raises(ValueError, match="No TensorStore data type"):
                ts.dtype(np.dtype(dtype))


def test_orbax_reads_it(tmp_path):
    host = {"w": floats(300, 1024), "b": floats(3, dtype=ml_dtypes.bfloat16)}
    write(tmp_path, [array("w", host["w"], (100, 1024)), array("b", host["b"])])
    (tmp_path / "_METADATA").write_text(_metadata(["w", "b"]))
    with ocp.PyTreeCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path)
    for key, want in host.items():
        np.testing.assert_array_equal(got[key], want)


def _metadata(names):
    import json

    entries = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    return json.dumps({"tree_metadata": entries, "use_zarr3": False})


@pytest.mark.parametrize("limit", [1 << 30, 8 << 20, 1 << 20])
def test_small_leaves_are_few_files(tmp_path, limit):
    arrays = [array(f"a.{i}", floats(256)) for i in range(2000)]
    located = write(tmp_path, arrays, memory_limit=limit)
    assert len(located) == 4000
    assert [v.key for v in located] == sorted(v.key for v in located)
    assert uncovered(tmp_path) == 0
    assert set(map(os.path.dirname, files(tmp_path))) == {"", "d", "m"}
    assert len(files(tmp_path)) <= (13 if limit == 1 << 20 else 3)
    np.testing.assert_array_equal(read(tmp_path, "a.1999"), arrays[1999][1])


def test_data_files_end_with_their_last_value(tmp_path):
    # tensorstore fills large files up to a page
    write(tmp_path, [array("a", floats(3 << 20)), array("v", np.zeros(1001, np.uint8))])
    assert uncovered(tmp_path) == 0
    assert sum(size for name, size in files(tmp_path).items() if name.startswith("d/")) == (12 << 20) + 1001
    np.testing.assert_array_equal(read(tmp_path, "a"), floats(3 << 20))


@pytest.mark.parametrize("limit", [1 << 30, 4 << 20])
def test_large_leaves_with_chunks_that_are_not_contiguous(tmp_path, limit):
    big, tall = floats(1024, 1024), floats(600, 2048)
    arrays = [array("big", big, (512, 512)), array("tall", tall, (200, 2048)), array("raw", tall, raw=True)]
    located = write(tmp_path, arrays, memory_limit=limit)
    np.testing.assert_array_equal(read(tmp_path, "big"), big)
    np.testing.assert_array_equal(read(tmp_path, "tall"), tall)
    raw = [v for v in located if v.key.startswith("raw/")]
    assert [v.key for v in raw] == ["raw/0.0"]
    assert value_of(tmp_path, raw[0]) == tall.tobytes()
    assert uncovered(tmp_path) == 0


def test_dtypes_of_odd_sizes(tmp_path):
    words = np.array(["abcde"] * 70_000)
    located = write(tmp_path, [array("w", words, raw=True)])
    assert value_of(tmp_path, located[0]) == words.tobytes()


def test_the_tree_that_is_one_array(tmp_path):
    located = write(tmp_path, [array("", floats(3))])
    assert [v.key for v in located] == [".zarray", "0"]


def test_aliases(tmp_path):
    big, small = floats(1 << 19), floats(4)
    located = write(
        tmp_path,
        [array("a.big", big), array("s", small), array("s.t", small)],
        aliases=[("a.big", "z"), ("s", "b.c")],
    )
    where = {v.key: v for v in located}
    assert where["z/0"][1:] == where["a.big/0"][1:]
    assert set(where) == {f"{k}/{n}" for k in ("a.big", "s", "s.t", "z", "b.c") for n in (".zarray", "0")}
    np.testing.assert_array_equal(read(tmp_path, "z"), big)
    np.testing.assert_array_equal(read(tmp_path, "b.c"), small)
    assert uncovered(tmp_path) == 0
    assert sum(files(tmp_path).values()) < big.nbytes + 4096


def test_odd_keys(tmp_path):
    keys = ["a b", "ü.✓", "a/b", "%41", "x:y", "..", "?q", "#"]
    located = write(tmp_path, [array(k, floats(256)) for k in keys], aliases=[(k, f"{k}+") for k in keys])
    assert {v.key for v in located} == {
        f"{k}{s}/{n}" for k in keys for s in ("", "+") for n in (".zarray", "0")
    }


def test_merged_databases_are_located(tmp_path):
    tree = {"w": np.arange(4096, dtype=np.float32)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "o", tree)
    [chunk] = [v for v in locate(tmp_path / "o") if v.key == "w/0"]
    assert chunk.file.startswith("ocdbt.process_0/d/")
    assert (tmp_path / "o" / chunk.file).stat().st_size >= chunk.offset + chunk.length


@pytest.mark.parametrize("limit", [1 << 30, 1 << 16])
def test_our_reading_of_the_tree_is_tensorstores(tmp_path, limit):
    arrays = [array(f"{'a.' * (i % 7)}{i}", np.full(300 if i % 3 else 5, i)) for i in range(3000)]
    arrays += [array("big", np.zeros((20, 1 << 19)), (1, 1 << 19)), array("é/ß", np.zeros(0), (1,))]
    write(tmp_path, arrays, [("big", "tied"), ("1", "zz")], memory_limit=limit)
    theirs, ours = kv_dump.locate(str(tmp_path)), ocdbt.located(str(tmp_path))
    assert values(ours) == values(theirs)
    assert len(ours.keys) > 6000


@given(st.dictionaries(st.text(min_size=1, max_size=40), st.integers(0, 2000), max_size=60))
@settings(max_examples=60, deadline=None)
def test_our_reading_of_any_tree_is_tensorstores(sizes):
    with tempfile.TemporaryDirectory() as directory:
        arrays = [
            (Item((size,), (size,), (key,), None, False), np.arange(size, dtype=np.uint8))
            for key, size in sizes.items()
            if len(key.encode("utf-8", "ignore")) and not any("\ud800" <= c <= "\udfff" for c in key)
        ]
        write(directory, arrays)
        assert values(ocdbt.located(directory)) == values(kv_dump.locate(directory))


@pytest.mark.parametrize("name", ["manifest.ocdbt", "m"])
def test_a_damaged_tree_is_refused(tmp_path, name):
    write(tmp_path, [array(f"{i}", np.full(300, i)) for i in range(900)])
    [path] = [p for p in tmp_path.rglob("*") if p.is_file() and (p.name == name or p.parent.name == name)]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", bytes(8) + whole[8:], whole[:-9] + whole[-4:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="OCDBT"):
            ocdbt.located(str(tmp_path))


def test_errors(tmp_path):
    with pytest.raises(CorruptCheckpointError, match="cannot be read") as caught:
        kv_dump.locate(str(tmp_path / "none"))
    assert caught.value.files == ("manifest.ocdbt",)
    (tmp_path / "f").write_text("")
    with pytest.raises(SaveError, match="cannot write 12 bytes"):
        write(tmp_path / "f" / "db", [array("a", floats(3))])
    with pytest.raises(ValueError, match="do not divide"):
        array("a", floats(3), (2,))
    assert len(write(tmp_path, [])) == 1  # one with no key at all would have no file


def test_by_reference_takes_no_memory(tmp_path):
    code = f"""
        import numpy as np, resource, sys, tempfile
        sys.path.insert(0, "tests")
        from databases import array, write
        host = [np.ones((4, 1, 2 << 20), np.float32) for _ in range(6)]
        write(tempfile.mkdtemp(), [])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for chunk in ((1, 1, 2 << 20), (4, 1, 2 << 20), (1, 1, 1 << 19)):
            write(tempfile.mkdtemp(dir={str(tmp_path)!r}), [array(str(i), h, chunk) for i, h in enumerate(host)])
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10)
    """
    assert int(child(code)) < 16


def child(code, returncode=0):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == returncode, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise SystemExit(3)"])
def test_writing_while_the_interpreter_shuts_down(tmp_path, end):
    code = f"""
        import sys, threading, time, numpy as np
        sys.path.insert(0, "tests")
        from databases import array, write
        from jaxckpt.storage import handler
        arrays = [array(str(i), np.full(400_000 if i % 9 == 0 else 300, i)) for i in range(99)]
        def work():
            threading.main_thread().join()
            time.sleep(0.1)
            write({str(tmp_path)!r}, arrays, aliases=[("1", "one")], memory_limit=100_000, writer=handler.write)
        threading.Thread(target=work).start()
        {end}
    """
    child(code, 0 if end == "pass" else 3)
    np.testing.assert_array_equal(read(tmp_path, "one"), np.full(300, 1))
    assert len(locate(tmp_path)) == 200


def test_a_forked_child_is_told(tmp_path):
    code = f"""
        import os, sys, warnings, numpy as np
        sys.path.insert(0, "tests")
        warnings.simplefilter("ignore")
        from jaxckpt.errors import SaveError
        from databases import array, write
        from jaxckpt.storage import kv, kv_dump
        arrays = [array("a", np.ones(3))]
        write({str(tmp_path)!r}, arrays)
        pid = os.fork()
        if not pid:
            for call in (lambda: write({str(tmp_path)!r}, arrays), lambda: kv_dump.locate({str(tmp_path)!r}), kv.context):
                try: call()
                except SaveError as error: print(error, flush=True)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        print(len(kv_dump.locate({str(tmp_path)!r}).keys))
    """
    lines = child(code).splitlines()
    assert len(lines) == 4
    assert all("forked" in line and "spawn" in line for line in lines[:3])
    assert lines[3] == "2"
