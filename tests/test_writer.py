"""The background writer: order, room, failures, exits, forks."""

import functools
import gc
import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref

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

    writer, held = Writer(), Held()
    alive = weakref.ref(held)

    def snapshot(held=held):
        return (lambda: SaveReport(path=str(held))), 1

    future = writer.submit("a", 1, GIB, snapshot)
    del snapshot, held
    future.result()
    assert alive() is None


def test_a_failure_keeps_none_of_what_the_save_held():
    """Neither does the error, whoever keeps it, nor the list of what nobody has looked at."""

    class Held:
        pass

    def write(held):
        inner = held  # noqa: F841
        try:
            raise ValueError("first")
        except ValueError as error:
            raise OSError("disk full") from error

    writer, held = Writer(), Held()
    alive = weakref.ref(held)
    taken = [functools.partial(write, held)]
    future = writer.submit("a", 1, GIB, lambda: (taken.pop(), 1))
    del held
    error = future.exception()
    assert [line.name for line in traceback.extract_tb(error.__cause__.__traceback__)] == ["write"]
    gc.collect()
    assert alive() is None


def test_a_failure_is_unseen_until_somebody_looks():
    writer = Writer()
    first, second = writer.fail("a", OSError("x")), writer.fail("b", OSError("y"))
    assert writer.unseen() == [first, second]
    first.exception()
    assert writer.unseen() == [second]


def test_a_save_from_inside_a_save_is_refused_and_does_not_wait_for_itself():
    writer = Writer()

    def inner():
        writer.submit("b", 0, GIB, started([], "b"))

    with pytest.raises(RuntimeError, match="b is to be saved from inside another save"):
        writer.submit("a", 0, GIB, lambda: (inner, 0)).result(10)
    after = queue.Queue()
    future = writer.submit("c", 0, GIB, started([], "c"))
    future.add_done_callback(lambda _: after.put(writer.submit("d", 0, GIB, started([], "d"))))
    assert after.get(timeout=10).result(10).path == "d"


def test_a_system_without_threads_saves_in_the_call(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    writer, log = Writer(), []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    future = writer.submit("a", 0, GIB, started(log, "a"))
    assert log == ["a"]
    assert future.result(0).path == "a"
    assert not writer.busy


def test_an_interrupt_while_the_thread_starts_leaves_nothing_under_way(monkeypatch):
    """Whether the thread was there by then or not: the call has failed, so its save is not made."""
    start = threading.Thread.start
    threads = []

    def started_already(thread):
        start(thread)
        threads.append(thread)
        raise KeyboardInterrupt

    def not_started(thread):
        raise KeyboardInterrupt

    for how in (started_already, not_started):
        writer, log = Writer(), []
        monkeypatch.setattr(threading.Thread, "start", how)
        with pytest.raises(KeyboardInterrupt):
            writer.submit("a", 0, GIB, started(log, "a"))
        monkeypatch.undo()
        assert writer.wait(writer.under_way(), 10)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert log == []
        assert writer.submit("b", 0, GIB, started(log, "b")).result().path == "b"


def run(code, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


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
    assert result.returncode == 120
    assert "jaxckpt: saving" in result.stderr
