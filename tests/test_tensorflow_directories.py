"""TensorFlow's habits that are kept, or bettered: managers, state files, readers, failing and competing saves.

The ids are those of the study of its behaviour.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt

TREE = {"x": jnp.ones(2)}


def numbered(*values):
    return [{"x": jnp.full(2, float(value))} for value in values]


def filled(directory, times, **options):
    with jaxckpt.CheckpointManager(directory, **options) as manager:
        for tree in numbered(*range(1, times + 1)):
            manager.save(tree)
    return jaxckpt.CheckpointManager(directory)


def names(paths):
    return [os.path.basename(path) for path in paths]


# F: managers


@pytest.mark.parametrize("value", [0, -1])
def test_max_to_keep_is_positive(tmp_path, value):
    """F1."""
    with pytest.raises(ValueError, match="max_to_keep"):
        jaxckpt.CheckpointManager(tmp_path, max_to_keep=value)
    assert filled(tmp_path, 4, max_to_keep=None).steps == [1, 2, 3, 4]


def test_an_old_one_goes_only_after_the_new_one_is_durable(tmp_path):
    """F2: at every instant enough of them are there, and the state file names none that is not."""
    seen: list[tuple[set[str], set[str]]] = []
    ended = threading.Event()

    def watch():
        while not ended.is_set():
            listed = set(names(jaxckpt.CheckpointManager(tmp_path).checkpoints))
            seen.append((listed, {name for name in os.listdir(tmp_path) if name.startswith("ckpt-")}))
            time.sleep(0.001)

    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        manager.save({"x": np.ones(1 << 16)}).result()
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            for _ in range(8):
                manager.save({"x": np.ones(1 << 16)}).result()
        finally:
            ended.set()
            thread.join()
    assert len(seen) > 3
    assert all(listed and there for listed, there in seen)


def test_one_for_each_interval_of_time(tmp_path, monkeypatch):
    """F3, F4: kept ones are listed, and never deleted later."""
    clock = [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    options = {"max_to_keep": 1, "keep_every": timedelta(hours=1)}
    with jaxckpt.CheckpointManager(tmp_path, **options) as manager:
        for _ in range(9):
            manager.save(TREE).result()
            clock[0] += 20 * 60
        kept = manager.steps
        assert len(kept) in (3, 4)
        assert kept[-1] == 9
        gaps = np.diff(kept[:-1])
        assert set(gaps) == {3}
    with jaxckpt.CheckpointManager(tmp_path, **options) as manager:
        manager.save(TREE).result()
        assert set(kept[:-1]) <= set(manager.steps)


@pytest.mark.parametrize("step", [-3600.0, -1e8])
def test_a_clock_that_moves_backwards(tmp_path, monkeypatch, step):
    """F5: the order is that of the commits."""
    clock = [1.7e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(clock[0] * 1e9))
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=2) as manager:
        for tree in numbered(1, 2, 3, 4):
            manager.save(tree).result()
            clock[0] += step
        assert manager.steps == [3, 4]
    os.remove(tmp_path / "checkpoint")
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=2) as manager:
        assert manager.steps == [3, 4]
        assert manager.restore(TREE).tree["x"][0] == 4


def test_an_interval_of_steps(tmp_path):
    """F6, F7: a skipped save gives None; a loop in strides is not starved."""
    with jaxckpt.CheckpointManager(tmp_path, save_every=10) as manager:
        futures = {step: manager.save(TREE, step=step) for step in range(3, 60, 7)}
        assert [step for step, future in futures.items() if future is not None] == [3, 10, 24, 31, 45, 52]
        assert manager.save(TREE, step=53) is None
        assert manager.save(TREE, step=54, force=True) is not None
        assert not manager.should_save(55)
        assert manager.should_save(60)
        manager.wait()
        assert manager.steps == [3, 10, 24, 31, 45, 52, 54]


@pytest.mark.parametrize("rule", [timedelta(hours=1), lambda step: step == 4])
def test_an_interval_of_time_and_a_function(tmp_path, rule):
    with jaxckpt.CheckpointManager(tmp_path, save_every=rule) as manager:
        for step in range(6):
            manager.save(TREE, step=step)
        manager.wait()
        assert manager.steps == [4 if callable(rule) else 0]


def test_the_newest_is_gone(tmp_path):
    """F8, F12: the list is what exists."""
    filled(tmp_path, 3)
    shutil.rmtree(tmp_path / "ckpt-3")
    manager = jaxckpt.CheckpointManager(tmp_path)
    assert manager.steps == [1, 2]
    assert jaxckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")
    assert manager.restore(TREE).tree["x"][0] == 2
    assert manager.restore_or_initialize(lambda: TREE).tree["x"][0] == 2
    with pytest.raises(jaxckpt.CheckpointNotFoundError, match="2"):
        manager.restore(TREE, step=3)


def damage(path):
    for name in os.listdir(path / "d"):
        data = bytearray((path / "d" / name).read_bytes())
        data[:] = bytes(byte ^ 255 for byte in data)
        (path / "d" / name).write_bytes(data)


def test_the_newest_is_damaged(tmp_path):
    """F8: the next whole one, with one warning that names it; asked for by its step it raises."""
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        for value in (1, 2, 3):
            manager.save({"x": jnp.full(1000, float(value))})
    damage(tmp_path / "ckpt-3")
    manager = jaxckpt.CheckpointManager(tmp_path)
    with pytest.warns(jaxckpt.CorruptCheckpointWarning, match="ckpt-3") as caught:
        got, _ = manager.restore({"x": jnp.zeros(1000)})
    assert len(caught) == 1
    assert got["x"][0] == 2
    with pytest.raises(jaxckpt.CorruptCheckpointError):
        manager.restore({"x": jnp.zeros(1000)}, step=3)
    os.remove(tmp_path / "ckpt-2" / "graph.json")
    with pytest.warns(jaxckpt.CorruptCheckpointWarning, match="ckpt-2"):
        assert manager.restore({"x": jnp.zeros(1000)}).tree["x"][0] == 1
    damage(tmp_path / "ckpt-1")
    with pytest.raises(jaxckpt.CorruptCheckpointError):  # never the target back
        manager.restore({"x": jnp.zeros(1000)})
    with pytest.raises(jaxckpt.CorruptCheckpointError):
        manager.restore_or_initialize(lambda: {"x": jnp.zeros(1000)})


def test_none_is_whole(tmp_path):
    """F8: only "not found" may mean to start afresh."""
    filled(tmp_path, 2)
    for step in (1, 2):
        os.remove(tmp_path / f"ckpt-{step}" / "graph.json")
    manager = jaxckpt.CheckpointManager(tmp_path)
    for call in (
        lambda: jaxckpt.restore(jaxckpt.latest_checkpoint(tmp_path), TREE).tree,
        lambda: jaxckpt.load_checkpoint(tmp_path),
        lambda: manager.restore(TREE).tree,
        lambda: manager.restore_or_initialize(lambda: TREE).tree,
        lambda: manager.latest_checkpoint,
    ):
        with pytest.raises(jaxckpt.CorruptCheckpointError, match="ckpt-1"):
            call()


def test_newest_or_initialized(tmp_path):
    """F8."""
    init = lambda: {"x": jnp.full(2, 5.0), "new": jnp.full(1, 6.0)}
    with jaxckpt.CheckpointManager(tmp_path / "new") as manager:
        got = manager.restore_or_initialize(init).tree
        assert (got["x"][0], got["new"][0]) == (5, 6)
        manager.save({"x": jnp.full(2, 7.0)}).result()
        got = manager.restore_or_initialize(init, partial=True).tree
        assert (got["x"][0], got["new"][0]) == (7, 6)


@pytest.mark.parametrize("content", [b"", b"garbage", b"{", b'{"version": 999}', b"[]", b"null", b"\xff\xfe"])
def test_a_damaged_state_file(tmp_path, content):
    """F13: rebuilt from the directory, with a warning."""
    filled(tmp_path, 3, max_to_keep=2)
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.warns(jaxckpt.CheckpointWarning, match="checkpoint"):
        assert jaxckpt.CheckpointManager(tmp_path).steps == [2, 3]
    with (
        pytest.warns(jaxckpt.CheckpointWarning),
        jaxckpt.CheckpointManager(tmp_path, max_to_keep=2) as manager,
    ):
        manager.save(TREE).result()
        assert manager.steps == [3, 4]
    assert jaxckpt.CheckpointManager(tmp_path).steps == [3, 4]


def test_a_lost_state_file(tmp_path):
    """F13: the manifests know it all; no warning."""
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=3) as manager:
        for step in (10, 30, 20):
            manager.save(TREE, step=step, metrics={"loss": step / 2})
    os.remove(tmp_path / "checkpoint")
    manager = jaxckpt.CheckpointManager(tmp_path)
    assert jaxckpt.latest_checkpoint(tmp_path).endswith("ckpt-20")
    assert names(manager.checkpoints) == ["ckpt-10", "ckpt-30", "ckpt-20"]
    assert manager.info(30).metrics == {"loss": 15.0}
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=2) as manager:
        assert manager.save(TREE).result().path.endswith("ckpt-31")
        assert names(manager.checkpoints) == ["ckpt-20", "ckpt-31"]


def test_checkpoints_saved_by_hand(tmp_path):
    """F14: listed, never deleted."""
    by_hand = [jaxckpt.Checkpoint(**TREE).save(tmp_path / "ckpt") for _ in range(2)]
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        assert manager.checkpoints == by_hand
        for _ in range(3):
            manager.save(TREE)
        manager.wait()
        assert manager.steps == [1, 2, 5]


def test_a_directory_that_moves(tmp_path):
    """F15: paths are relative; other files are left alone."""
    filled(tmp_path / "a", 2)
    (tmp_path / "a" / "notes.txt").write_text("x")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert jaxckpt.latest_checkpoint(tmp_path / "b") == str(tmp_path / "b" / "ckpt-2")
    with jaxckpt.CheckpointManager(tmp_path / "b", max_to_keep=1) as manager:
        assert manager.restore(TREE).tree["x"][0] == 2
        manager.save(TREE).result()
        assert manager.checkpoints == [str(tmp_path / "b" / "ckpt-3")]
    assert (tmp_path / "b" / "notes.txt").read_text() == "x"
    assert not (tmp_path / "a").exists()


def test_relative_paths(tmp_path, monkeypatch):
    """F15: they mean the same from start to end of a program that changes its directory meanwhile."""
    monkeypatch.chdir(tmp_path)
    with jaxckpt.CheckpointManager("here") as manager:
        manager.save(TREE).result()
    assert jaxckpt.latest_checkpoint("here") == os.path.join("here", "ckpt-1")
    assert jaxckpt.restore(jaxckpt.latest_checkpoint("here"), TREE).tree["x"][0] == 1


HOLDER = """
import sys, jaxckpt
manager = jaxckpt.CheckpointManager(sys.argv[1], max_to_keep=1)
manager.save({"x": 1}).result()
print("holding", flush=True)
sys.stdin.readline()
manager.save({"x": 2}).result()
manager.close()
"""


def test_two_writers(tmp_path):
    """F16: the second raises, naming the first; readers never do."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        assert child.stdout.readline() == b"holding\n"
        manager = jaxckpt.CheckpointManager(tmp_path, max_to_keep=1)
        with pytest.raises(jaxckpt.DirectoryInUseError, match=str(child.pid)):
            manager.save({"x": 9})
        assert manager.restore({"x": 0}).tree == {"x": 1}
        assert manager.steps == [1]
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.wait(60) == 0
        assert manager.save({"x": 3}).result().path.endswith("ckpt-3")
        manager.close()
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert jaxckpt.CheckpointManager(tmp_path).steps == [3]


def test_a_cell_that_is_run_twice(tmp_path):
    """F16: in one process the newer manager takes over."""
    old = jaxckpt.CheckpointManager(tmp_path)
    old.save(TREE).result()
    new = jaxckpt.CheckpointManager(tmp_path)
    new.save(TREE).result()
    with pytest.raises(jaxckpt.DirectoryInUseError):
        old.save(TREE)
    assert new.save(TREE).result().path.endswith("ckpt-3")
    new.close()


def test_waiting_for_the_next(tmp_path):
    """F17: the newest, skipping what came between."""
    manager = jaxckpt.CheckpointManager(tmp_path)
    manager.save(TREE).result()
    seen: list[str] = []
    for path in jaxckpt.checkpoints_iterator(tmp_path, timeout=10):
        seen.append(os.path.basename(path))
        if len(seen) == 3:
            break
        for _ in range(2):
            manager.save(TREE).result()
    assert seen == ["ckpt-1", "ckpt-3", "ckpt-5"]
    manager.close()


def test_waiting_in_an_empty_directory(tmp_path):
    """F17."""
    asked: list[int] = []
    manager = jaxckpt.CheckpointManager(tmp_path / "later")

    def timed_out():
        asked.append(1)
        if len(asked) == 1:
            manager.save(TREE).result()
            manager.save(TREE).result()
        return len(asked) > 2

    found = list(jaxckpt.checkpoints_iterator(tmp_path / "later", timeout=0.05, timeout_fn=timed_out))
    assert names(found) == ["ckpt-2"]
    assert len(asked) == 3
    assert list(jaxckpt.checkpoints_iterator(tmp_path / "nothing", timeout=0)) == []
    manager.close()


@pytest.mark.parametrize("call", [lambda m: m.save(5), lambda m: m.restore(5), lambda m: m.save(np.int64(5))])
def test_a_step_in_the_place_of_a_tree(tmp_path, call):
    with jaxckpt.CheckpointManager(tmp_path) as manager, pytest.raises(TypeError, match="step="):
        call(manager)


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
