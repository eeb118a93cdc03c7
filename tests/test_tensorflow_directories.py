"""TensorFlow's habits that are kept, or bettered: managers, their retention, their state file, their lease.

The ids are those of the study of its behaviour.
"""

from __future__ import annotations

import os
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
    manager = jaxckpt.CheckpointManager(tmp_path, max_to_keep=2)
    with pytest.warns(jaxckpt.CheckpointWarning):
        manager.save(TREE).result()
    assert manager.steps == [3, 4]
    manager.close()
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
