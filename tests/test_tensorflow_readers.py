"""TensorFlow's habits that are kept, or bettered: failing saves, readers, readers and writers at once.

The ids are those of the study of its behaviour.
"""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt

TREE = {"x": jnp.ones(2)}


def filled(directory, times):
    with jaxckpt.CheckpointManager(directory) as manager:
        for value in range(1, times + 1):
            manager.save({"x": jnp.full(2, float(value))})


# B, I: failing saves


def test_a_save_that_is_refused_uses_no_number(tmp_path):
    """B9."""
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        manager.save(TREE).result()
        for _ in range(2):
            with pytest.raises(jaxckpt.UnsupportedLeafError, match="bad"):
                manager.save({"bad": {1, 2}})
        assert manager.save(TREE).result().path.endswith("ckpt-2")


class FullDisk:
    """While it is open no file may grow beyond some bytes."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.nbytes, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


LARGE = {"x": np.ones(1 << 18)}


@pytest.mark.parametrize("raises_at", ["result", "save", "wait", "close"])
def test_a_save_that_fails_in_the_background(tmp_path, raises_at):
    """B9, I2: raised at the next call, nothing left behind, no number used."""
    manager = jaxckpt.CheckpointManager(tmp_path)
    manager.save(TREE).result()
    with FullDisk(1 << 17):
        future = manager.save(LARGE)
        if raises_at == "result":
            with pytest.raises(jaxckpt.SaveError, match="ckpt-2"):
                future.result()
        else:
            while not future.done():
                time.sleep(0.01)
    if raises_at != "result":
        with pytest.raises(jaxckpt.CheckpointError, match="ckpt-2"):
            {"save": lambda: manager.save(TREE), "wait": manager.wait, "close": manager.close}[raises_at]()
    assert manager.latest_checkpoint.endswith("ckpt-1")
    assert not [name for name in os.listdir(tmp_path) if name not in ("checkpoint", "ckpt-1", ".jaxckpt")]
    if raises_at == "close":
        manager = jaxckpt.CheckpointManager(tmp_path)
    assert manager.save(LARGE).result().path.endswith("ckpt-2")
    manager.close()


def test_a_save_by_hand_that_fails(tmp_path):
    """B9: `overwrite=True` leaves the old one whole."""
    jaxckpt.save(tmp_path / "c", TREE)
    with FullDisk(1 << 17):
        for path, overwrite in ((tmp_path / "d", False), (tmp_path / "c", True)):
            with pytest.raises(jaxckpt.SaveError, match=path.name):
                jaxckpt.save(path, LARGE, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["c"]
    assert (jaxckpt.load_checkpoint(tmp_path / "c")["x"] == 1).all()
    jaxckpt.save(tmp_path / "d", LARGE)


@pytest.mark.parametrize("name", ["ckpt", "ckpt-7", "ckt-1", "nowhere/ckpt-1"])
def test_a_missing_path_says_what_is_there(tmp_path, name):
    """B10."""
    filled(tmp_path, 2)
    with pytest.raises(jaxckpt.CheckpointNotFoundError, match="nowhere" if "/" in name else "ckpt-[12]"):
        jaxckpt.restore(tmp_path / name, TREE)
    with pytest.raises(FileNotFoundError):
        jaxckpt.load_checkpoint(tmp_path / name)


# G: readers


@pytest.fixture
def written(tmp_path):
    tree = {
        "net": {"w": jnp.ones((2, 3)), "b": np.arange(4, dtype=np.int16)},
        "step": 7, "rate": 0.5, "flag": True, "name": "run", "raw": b"x", "z": jnp.zeros((0, 2), jnp.bfloat16),
    }  # fmt: skip
    jaxckpt.save(tmp_path / "c", tree)
    return tmp_path / "c"


def test_a_reader(written):
    """G1 to G6."""
    reader = jaxckpt.load_checkpoint(written)
    shapes = {"flag": [], "net/b": [4], "net/w": [2, 3], "rate": [], "step": [], "z": [0, 2]}
    assert reader.get_variable_to_shape_map() == shapes
    assert list(reader.get_variable_to_shape_map()) == sorted(shapes)
    dtypes = reader.get_variable_to_dtype_map()
    assert {key: str(np.dtype(dtype)) for key, dtype in dtypes.items() if key != "step"} == {
        "flag": "bool", "net/b": "int16", "net/w": "float32", "rate": "float64", "z": "bfloat16",
    }  # fmt: skip
    assert jaxckpt.list_variables(written) == sorted(shapes.items())
    assert set(reader) == {*shapes, "name", "raw"}
    assert len(reader) == 8
    assert (reader["step"], reader["rate"], reader["flag"], reader["name"], reader["raw"]) == (
        7,
        0.5,
        True,
        "run",
        b"x",
    )
    assert type(reader["net/w"]) is np.ndarray
    for key in shapes:
        assert reader.has_tensor(key)
        assert type(reader.get_tensor(key)) is np.ndarray
        assert list(reader.get_tensor(key).shape) == shapes[key]
    assert not reader.has_tensor("name")
    assert reader.has_tensor("net/w/.ATTRIBUTES/VARIABLE_VALUE")
    assert "net/w/.ATTRIBUTES/VARIABLE_VALUE" in reader
    assert not reader.has_tensor("net")
    assert "net/w" in reader.debug_string()


@pytest.mark.parametrize("key", ["net", "net/w2", "", ".", "net/w/", "/net/w"])
def test_a_key_that_is_not_there(written, key):
    """G4."""
    reader = jaxckpt.load_checkpoint(written)
    with pytest.raises(KeyError):
        reader[key]
    with pytest.raises(KeyError):
        reader.get_tensor(key)
    assert reader.get(key) is None


def test_a_directory_means_its_newest(tmp_path):
    """G5."""
    filled(tmp_path, 3)
    assert jaxckpt.load_checkpoint(tmp_path).path == str(tmp_path / "ckpt-3")
    assert jaxckpt.list_variables(tmp_path) == [("x", [2])]
    assert jaxckpt.latest_checkpoint(tmp_path / "nosuch") is None
    with pytest.raises(jaxckpt.CheckpointNotFoundError):
        jaxckpt.load_checkpoint(tmp_path / "nosuch")


def test_an_open_reader_survives_deletion(tmp_path):
    """G6: small values and large ones, one overwritten in place too."""
    tree = {"x": np.arange(10), "y": np.arange(1 << 20), "s": "text", "n": 2**70}
    jaxckpt.save(tmp_path / "c", tree)
    jaxckpt.save(tmp_path / "d", tree)
    readers = [jaxckpt.load_checkpoint(tmp_path / name) for name in "cd"]
    shutil.rmtree(tmp_path / "c")
    jaxckpt.save(tmp_path / "d", {"x": np.zeros(10)}, overwrite=True)
    for reader in readers:
        for key, value in tree.items():
            np.testing.assert_array_equal(reader[key], value)


def test_the_dry_run_and_the_abstract_target(written):
    """What `restore` would do, and a target without a program."""
    reader = jaxckpt.load_checkpoint(written)
    status = reader.match({"net": {"w": jnp.zeros((2, 3))}, "new": 3})
    assert dict(status.restored) == {"net/w": ("net/w",)}
    assert set(status.missing) == {"new"}
    assert "step" in status.unused
    target = reader.target()
    got = jaxckpt.restore(reader, target).assert_consumed().assert_existing_objects_matched().tree
    assert got["step"] == 7
    np.testing.assert_array_equal(got["net"]["w"], 1)


# J: readers and writers at once


def test_readers_see_the_old_or_the_new(tmp_path):
    """J6, J7: never in place, never in between."""
    make = lambda value: {"a": np.full(1 << 12, value), "b": value, "c": np.full(3, value)}
    jaxckpt.save(tmp_path / "c", make(0))
    failed: list[BaseException] = []
    seen: set[int] = set()
    ended = threading.Event()

    def read():
        while not ended.wait(0.002):
            try:
                got, _ = jaxckpt.restore(tmp_path / "c", make(-1))
                values = {int(got["b"]), *got["a"].tolist(), *got["c"].tolist()}
                assert len(values) == 1, values
                seen.update(values)
            except BaseException as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    [thread.start() for thread in threads]
    try:
        for value in range(1, 25):
            jaxckpt.save(tmp_path / "c", make(value), overwrite=True)
    finally:
        ended.set()
        [thread.join() for thread in threads]
    assert not failed
    assert len(seen) > 1
    assert os.listdir(tmp_path) == ["c"]


def test_readers_of_a_directory_that_is_pruned(tmp_path):
    """J6: there is always a newest one, and what was newest once is never followed by an older one."""
    make = lambda value: {"a": np.full(1 << 12, value), "b": value}
    manager = jaxckpt.CheckpointManager(tmp_path, max_to_keep=1)
    manager.save(make(0)).result()
    failed: list[BaseException] = []
    ended = threading.Event()

    def restored():
        return int(jaxckpt.CheckpointManager(tmp_path).restore(make(-1)).tree["b"])

    def loaded():
        return int(jaxckpt.load_checkpoint(tmp_path)["b"])

    def listed():
        return int(jaxckpt.latest_checkpoint(tmp_path).rpartition("-")[2]) - 1

    def read(look):
        newest = 0
        while not ended.wait(0.002):
            try:
                value = look()
                assert value >= newest
                newest = value
            except BaseException as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=read, args=(look,)) for look in (restored, loaded, listed)]
    [thread.start() for thread in threads]
    try:
        for value in range(1, 30):
            manager.save(make(value)).result()
    finally:
        ended.set()
        [thread.join() for thread in threads]
        manager.close()
    assert not failed
