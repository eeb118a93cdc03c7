"""The background writer: order, room, failures, exits, forks."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxckpt.report import SaveReport
from jaxckpt.writer import Writer

GIB = 1 << 30


def started(log, name, gate=None, held=0):
    """A snapshot whose work waits for a gate."""

    def work():
        if gate is not None:
            assert gate.wait(10)
        log.append(name)
        return SaveReport(path=name)

    return lambda: (work, held)


def test_commits_come_in_order():
    writer, log, gate = Writer(), [], threading.Event()
    futures = [
        writer.submit("a", 0, GIB, started(log, "a", gate)),
        writer.submit("b", 0, GIB, started(log, "b")),
    ]
    time.sleep(0.05)
    assert log == []
    gate.set()
    assert [future.result().path for future in futures] == ["a", "b"] == log
    assert not writer.busy


def test_a_third_save_blocks_until_there_is_room():
    writer, log, gate = Writer(), [], threading.Event()
    writer.submit("a", 0, GIB, started(log, "a", gate))
    writer.submit("b", 0, GIB, started(log, "b"))
    taken = []
    caller = threading.Thread(
        target=lambda: taken.append(writer.submit("c", 0, GIB, started(log, "c")).result().path)
    )
    caller.start()
    time.sleep(0.1)
    assert caller.is_alive()
    assert taken == []
    gate.set()
    caller.join(10)
    assert taken == ["c"]
    assert log == ["a", "b", "c"]


@pytest.mark.parametrize(("limit", "waits"), [(150, True), (200, False)])
def test_a_waiting_snapshot_needs_room_for_both_copies(limit, waits):
    writer, log, gate, snapped = Writer(), [], threading.Event(), threading.Event()
    writer.submit("a", 100, limit, started(log, "a", gate, held=100))

    def snapshot():
        snapped.set()
        return started(log, "b", held=100)()

    caller = threading.Thread(target=lambda: writer.submit("b", 100, limit, snapshot).result())
    caller.start()
    assert snapped.wait(0.2) != waits
    gate.set()
    caller.join(10)
    assert log == ["a", "b"]


def test_a_snapshot_that_copies_nothing_does_not_wait():
    writer, log, gate = Writer(), [], threading.Event()
    writer.submit("a", 100, 100, started(log, "a", gate, held=100))
    future = writer.submit("b", 0, 100, started(log, "b"))
    gate.set()
    assert future.result().path == "b"


def test_a_failure_leaves_the_writer_fit_for_the_next():
    writer, log = Writer(), []

    def fail():
        raise OSError("disk full")

    future = writer.submit("a", 0, GIB, lambda: (fail, 0))
    with pytest.raises(OSError, match="disk full"):
        future.result()
    assert writer.submit("b", 0, GIB, started(log, "b")).result().path == "b"
    assert writer.unseen() == []


def test_a_snapshot_that_fails_raises_in_the_call_and_leaves_room():
    writer, log = Writer(), []

    def snapshot():
        raise TypeError("no leaf")

    for _ in range(5):
        with pytest.raises(TypeError, match="no leaf"):
            writer.submit("a", 0, GIB, snapshot)
    assert writer.submit("b", 0, GIB, started(log, "b")).result().path == "b"


def test_what_a_save_held_is_let_go_before_its_future_is_resolved():
    class Held:
        pass

    import weakref

    writer, held = Writer(), Held()
    alive = weakref.ref(held)

    def snapshot(held=held):
        return (lambda: SaveReport(path=str(held))), 1

    future = writer.submit("a", 1, GIB, snapshot)
    del snapshot, held
    future.result()
    assert alive() is None


def run(code, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


EXITS = {
    "leaving main": "",
    "sys.exit": "import sys; sys.exit(0)",
    "an uncaught exception": "raise RuntimeError('training failed')",
}


@pytest.mark.parametrize("end", EXITS)
def test_every_exit_waits_for_the_commit(tmp_path, end):
    code = f"""
    import jax.numpy as jnp, numpy as np, jaxckpt
    jaxckpt.save_async({str(tmp_path / "a")!r}, {{"w": jnp.ones((512, 1024)), "h": np.arange(10.)}})
    """
    result = run(textwrap.dedent(code) + EXITS[end])
    import jaxckpt

    reader = jaxckpt.load_checkpoint(tmp_path / "a")
    assert (reader["w"] == 1).all()
    assert reader["w"].shape == (512, 1024)
    assert result.returncode == (1 if "exception" in end else 0), result.stderr
    assert ("training failed" in result.stderr) == ("exception" in end)
    assert os.listdir(tmp_path) == ["a"]


def test_a_failure_that_nobody_saw_ends_in_a_non_zero_exit_and_one_line(tmp_path):
    path = tmp_path / "gone"
    path.mkdir()
    code = f"""
    import shutil, threading, jax.numpy as jnp, jaxckpt
    from jaxckpt import saving as save
    def fail(*_): raise OSError("the disk is gone")
    save.submit({{"w": jnp.ones(3)}}, save.Order(path={str(path / "a")!r}, before_commit=fail))
    print("main ends", flush=True)
    """
    result = run(code)
    assert result.returncode == 1
    assert result.stdout == "main ends\n"
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("jaxckpt: saving ")
    assert "the disk is gone" in lines[0]
    assert os.listdir(path) == []


def test_a_failure_that_was_seen_does_not_change_the_exit_code(tmp_path):
    code = f"""
    import jax.numpy as jnp, jaxckpt
    from jaxckpt import saving as save
    def fail(*_): raise OSError("the disk is gone")
    future = save.submit({{"w": jnp.ones(3)}}, save.Order(path={str(tmp_path / "a")!r}, before_commit=fail))
    assert isinstance(future.exception(), OSError)
    """
    result = run(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_forked_child_neither_waits_nor_finishes_its_parents_saves(tmp_path):
    code = f"""
    import os, threading, warnings, jax, jax.numpy as jnp, numpy as np, jaxckpt
    warnings.simplefilter("ignore")  # jax warns about every fork
    from jaxckpt import saving as save
    path = {str(tmp_path / "a")!r}
    reached, gate = threading.Event(), threading.Event()  # the save cannot end before the child has
    def slow(): reached.set(); assert gate.wait(60)
    key = jax.random.key(0)
    jaxckpt.save(path + "-before", {{"w": jnp.ones(3)}})
    future = save.submit({{"w": jnp.ones(3)}}, save.Order(path=path, before_commit=slow))
    assert reached.wait(60)
    child = os.fork()
    if child == 0:
        try:
            jaxckpt.save(path + "-child", {{"w": np.ones(3), "k": key}})
        except jaxckpt.CheckpointError as error:
            print("child:", type(error).__name__, flush=True)
        try:
            jaxckpt.restore(path + "-before", {{"w": jnp.zeros(3)}})
        except jaxckpt.CheckpointError as error:
            print("child:", type(error).__name__, flush=True)
        print("child:", jaxckpt.restore(path + "-before", {{"w": np.zeros(3, np.float32)}}).tree["w"], flush=True)
        os._exit(7)  # as the children of multiprocessing do; jax's own exit handlers can hang after a fork
    _, status = os.waitpid(child, 0)
    print("child ended with", os.waitstatus_to_exitcode(status), flush=True)
    gate.set()
    future.result()
    print(sorted(os.listdir({str(tmp_path)!r})))
    """
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "child: SaveError" in result.stdout
    assert "child: RestoreError" in result.stdout
    assert "child: [1. 1. 1.]" in result.stdout
    assert "child ended with 7" in result.stdout
    assert result.stdout.endswith("['a', 'a-before']\n")


def test_a_failure_beside_another_error_still_ends_in_a_non_zero_exit(tmp_path):
    code = f"""
    import resource, signal, numpy as np, jaxckpt, sys
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with jaxckpt.CheckpointManager({str(tmp_path / "d")!r}) as manager:
            manager.save({{"w": np.random.rand(1 << 20)}})
            raise ValueError("something else")
    except ValueError:
        pass
    """
    result = run(code)
    assert result.returncode == 1
    assert "jaxckpt: saving" in result.stderr
