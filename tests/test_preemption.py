"""Preemption: a real SIGTERM at any moment ends in a whole checkpoint of the step that the loop broke at."""

# ruff: noqa: F811  (fixtures are imported, and named again as arguments)

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from managing import Manager, broken, gate, hidden, tree, value  # noqa: F401  (fixtures)
from preempted_training import expected
from test_writer import run

import jaxckpt
from jaxckpt.preemption import notice

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning"),
]


@pytest.fixture
def signals():
    """Signals that a handler of the program has got; a signal that we lose does not end the tests."""
    notice.forget()
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGTERM, before)
    notice.forget()


# Real signals, real programs


@pytest.fixture
def start():
    """Starts programs, and ends those that a failed test has left."""
    started = []

    def start(*arguments):
        program = os.path.join(os.path.dirname(__file__), "preempted_training.py")
        process = subprocess.Popen(
            [sys.executable, program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    """What it has said last, after an exit with code 0."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def check(directory, step):
    """The newest is of that step; it and all others are what numpy says they are."""
    latest = jaxckpt.latest_checkpoint(directory)
    assert os.path.basename(latest) == f"ckpt-{step}"
    for name in os.listdir(directory):
        if name.startswith("ckpt-"):
            reader = jaxckpt.load_checkpoint(os.path.join(directory, name))
            want = expected(int(name.rpartition("-")[2]))
            assert set(reader) == set(want)
            assert all((reader[key] == want[key]).all() for key in want), name
    assert hidden(directory) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_random_moments_of_a_donating_loop(tmp_path, start, seed):
    said = end(start("random", str(tmp_path), str(seed), "25"))
    assert len(said) == 25
    for one in said:
        check(one["directory"], one["step"])  # its name is the seed and the round
    assert sum(one["donated"] for one in said) > sum(one["step"] for one in said) / 2
    assert len({one["step"] for one in said}) > 5  # moments differ


def test_other_moments(tmp_path, start):
    moments = ["compilation", "evaluation", "another save", "before the first step"]
    processes = {moment: start("moment", str(tmp_path / moment), moment) for moment in moments}
    for process in processes.values():
        assert json.loads(process.stdout.readline()) == {"now": True}
        process.send_signal(signal.SIGTERM)
    for moment, process in processes.items():
        [said] = end(process)
        check(tmp_path / moment, said["step"])
        assert (said["step"] == 0) == (moment == "before the first step")
    for name in ("big-0", "big-1"):
        assert (jaxckpt.load_checkpoint(tmp_path / "another save" / name)["w"] == 1).all()


def test_a_program_that_does_not_ask_dies_as_ever(tmp_path):
    code = f"""
    import os, signal, numpy as np, jaxckpt
    manager = jaxckpt.CheckpointManager({str(tmp_path / "d")!r})
    manager.save({{"w": np.ones(3)}}).result()
    os.kill(os.getpid(), signal.SIGTERM)
    """
    assert run(code).returncode == -signal.SIGTERM


# The handler


def test_who_had_the_signal_before_gets_it_too_and_gets_it_back(tmp_path, signals):
    theirs = signal.getsignal(signal.SIGTERM)
    one, other = Manager(tmp_path / "1"), Manager(tmp_path / "2")
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert not one.preempted(1)
    assert not other.preempted(1)
    assert signals == []
    signal.raise_signal(signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    assert one.preempted(2)
    signal.raise_signal(signal.SIGTERM)  # a second one changes nothing
    assert other.preempted(2)
    assert one.preempted(3)
    one.close()
    assert signal.getsignal(signal.SIGTERM) is not theirs
    other.close()
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert other.preempted(4)
    assert signal.getsignal(signal.SIGTERM) is theirs
    with Manager(tmp_path / "3") as later:
        assert later.preempted(1)  # it is the process that goes


def test_a_handler_that_replaces_ours_later(tmp_path, signals):
    with Manager(tmp_path) as manager:
        manager.preempted(1)
        ours, got = signal.getsignal(signal.SIGTERM), []

        def newest(number, frame):
            got.append(number)
            ours(number, frame)

        signal.signal(signal.SIGTERM, newest)
        assert not manager.preempted(2)
        signal.raise_signal(signal.SIGTERM)
        assert manager.preempted(3)
        assert got == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is newest
    signal.raise_signal(signal.SIGTERM)  # calls ours, though nobody asks any more
    assert got == [signal.SIGTERM] * 2
    assert signals == [signal.SIGTERM] * 2


def test_a_handler_that_exits_still_exits_with_everything_durable(tmp_path, signals):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    with pytest.raises(SystemExit), Manager(tmp_path) as manager:  # noqa: PT012
        manager.save(tree(), step=1)
        manager.preempted(1)
        signal.raise_signal(signal.SIGTERM)
    assert Manager(tmp_path).steps == [1]


def in_thread(function):
    results = []

    def work():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return results[0]


def test_another_thread(tmp_path, signals):
    """It cannot install a handler: never true, and never said why, would be the worst."""
    theirs = signal.getsignal(signal.SIGTERM)
    manager = Manager(tmp_path)
    error = in_thread(lambda: manager.preempted(1))
    assert isinstance(error, RuntimeError)
    assert "main thread" in str(error)
    assert not manager.preempted(1)
    assert in_thread(lambda: manager.preempted(2)) is False
    signal.raise_signal(signal.SIGTERM)
    assert in_thread(lambda: manager.preempted(3)) is True
    in_thread(manager.close)  # nor can it give the signal back
    signals.clear()
    signal.raise_signal(signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_managers_that_are_gone_hold_no_signal(tmp_path, signals):
    theirs = signal.getsignal(signal.SIGTERM)
    Manager(tmp_path).preempted(1)
    gc.collect()
    signal.raise_signal(signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert not Manager(tmp_path).preempted(1)


def test_an_interrupt_is_no_preemption(tmp_path, signals):
    with Manager(tmp_path) as manager:
        manager.preempted(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not manager.preempted(2)


@pytest.mark.parametrize("told", [False, True])
def test_a_forked_child_dies_of_the_signal(tmp_path, signals, told):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Manager(tmp_path) as manager:
        manager.preempted(1)
        if told:
            signal.raise_signal(signal.SIGTERM)
            assert manager.preempted(2)
        child = os.fork()
        if child == 0:
            try:
                if not notice.told:
                    os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert manager.preempted(3) == told


def test_steps_are_checked(tmp_path, signals):
    with Manager(tmp_path) as manager:
        for wrong in (1.5, None, True):
            with pytest.raises(TypeError, match="step must be an integer"):
                manager.preempted(wrong)
        assert not manager.preempted(np.int32(3))
    assert not manager.preempted(3)


# The save of a preempted step


@pytest.fixture
def sigterm(signals):
    """Sends it; the next question is answered with true."""
    return lambda: signal.raise_signal(signal.SIGTERM)


def test_the_save_of_a_preempted_step_is_always_made(tmp_path, gate, sigterm):
    with Manager(tmp_path, save_every=100, on_busy="skip") as manager:
        manager.preempted(0)
        first = manager.save({"n": 1}, step=1)
        sigterm()
        assert manager.save({"n": 2}, step=2) is None  # nobody has asked yet
        assert not manager.should_save(2)
        assert manager.preempted(2)
        assert manager.should_save(2)
        second = manager.save({"n": 2}, step=2)
        assert not first.done()
        threading.Timer(0.05, gate.set).start()
        assert manager.save({"n": 3}, step=3).result().step == 3  # waits for room
        assert second.result().step == 2
    assert manager.steps == [1, 2, 3]


def test_a_step_that_was_saved_just_before_is_not_saved_again(tmp_path, gate, sigterm):
    with Manager(tmp_path, save_every=1) as manager:
        manager.preempted(0)
        first = manager.save({"n": 1}, step=1)
        sigterm()
        assert manager.preempted(1)
        assert manager.save({"n": 1}, step=1) is first
        gate.set()
        assert first.result().step == 1
        assert manager.save({"n": 1}, step=1) is first
        assert manager.save({"n": 5}, step=1, overwrite=True).result().step == 1
        assert manager.restore({"n": 0}, step=1).tree == {"n": 5}


def test_without_a_notice_the_same_step_twice_raises(tmp_path, signals):
    with Manager(tmp_path) as manager:
        manager.save(tree(), step=1)
        assert not manager.preempted(1)
        with pytest.raises(jaxckpt.CheckpointExistsError):
            manager.save(tree(), step=1)


@pytest.mark.parametrize("step", [None, 10])
def test_the_step_that_was_restored_is_not_saved_again(tmp_path, sigterm, step):
    with Manager(tmp_path) as manager:
        manager.save(tree(1), step=10).result()
    with Manager(tmp_path) as manager:
        manager.restore(tree(), step=step).status.assert_consumed()
        manager.preempted(10)
        sigterm()
        assert manager.preempted(10)
        report = manager.save(tree(1), step=10).result()
        assert (report.path, report.step) == (str(tmp_path / "ckpt-10"), 10)


def test_a_step_that_the_run_comes_to_again_is_another(tmp_path, sigterm):
    """After a rewind ten is not the ten that was saved: that would lose what was trained since."""
    with Manager(tmp_path, save_every=5) as manager:
        manager.save(tree(1), step=10)
        manager.save(tree(1), step=5)
        manager.save(tree(1), step=11)
        with pytest.warns(jaxckpt.NewerCheckpointsWarning):
            manager.restore(tree(), step=5).status.assert_consumed()
        manager.preempted(5)
        sigterm()
        assert manager.preempted(11)
        with pytest.raises(jaxckpt.CheckpointExistsError):
            manager.save(tree(2), step=11)
        assert manager.preempted(12)
        assert manager.save(tree(2), step=12).result().step == 12


def test_an_evaluation_of_another_checkpoint_in_between(tmp_path, sigterm):
    with Manager(tmp_path) as manager:
        manager.preempted(0)
        manager.save(tree(1), step=1).result()
        future = manager.save(tree(2), step=2)
        with pytest.warns(jaxckpt.NewerCheckpointsWarning):
            assert value(manager.restore(tree(), step=1)) == 1
        sigterm()
        assert manager.preempted(2)
        assert manager.save(tree(2), step=2) is future


def test_an_earlier_failure_does_not_cost_the_last_save(tmp_path, broken, sigterm):
    manager = Manager(tmp_path)
    manager.preempted(0)
    broken.set()
    future = manager.save(tree(), step=1)
    while not future.done():
        time.sleep(0.001)
    broken.clear()
    sigterm()
    assert manager.preempted(2)
    assert manager.save(tree(2), step=2).result().step == 2
    with pytest.raises(OSError, match="No space"):
        manager.close()
    assert Manager(tmp_path).steps == [2]


def test_a_step_whose_save_failed_is_tried_again(tmp_path, broken, sigterm):
    with Manager(tmp_path) as manager:
        manager.preempted(0)
        broken.set()
        future = manager.save(tree(), step=1)
        assert isinstance(future.exception(), OSError)
        broken.clear()
        sigterm()
        assert manager.preempted(1)
        assert manager.save(tree(1), step=1).result().step == 1


# JAX's own service


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize(("count", "stride"), [(1, 1), (2, 7)])
def test_jax_tells_all_processes_the_same_step(tmp_path, start, count, stride):
    port = free_port()
    processes = [
        start("distributed", str(tmp_path), port, str(index), str(count), str(stride))
        for index in range(count)
    ]
    for process in processes:
        assert json.loads(process.stdout.readline()) == {"now": True}
    processes[-1].send_signal(signal.SIGTERM)
    steps = [end(process)[-1]["step"] for process in processes]
    assert len(set(steps)) == 1
    for index in range(count):
        reader = jaxckpt.load_checkpoint(jaxckpt.latest_checkpoint(tmp_path / str(index)))
        assert (reader["x"] == steps[0]).all()


def test_where_jax_cannot_hear(tmp_path):
    """It is said, instead of false for ever; without the service one process hears for itself."""
    code = f"""
    import os, signal, jax, jaxckpt
    port = {free_port()!r}
    manager = jaxckpt.CheckpointManager({str(tmp_path)!r})
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(f"localhost:{{port}}", 1, 0)
    jax.process_count = lambda: 1  # the real one would start the backend, which is meant to come later
    assert not manager.preempted(1)
    jax.process_count = lambda: 2
    try:
        manager.preempted(1)
    except RuntimeError as error:
        print(error)
    jax.process_count = lambda: 1
    jax.distributed.shutdown()
    jax.config.update("jax_enable_preemption_service", True)
    jax.distributed.initialize(f"localhost:{{port}}", 1, 0)
    assert not manager.preempted(2)
    theirs = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        manager.preempted(3)
    except RuntimeError as error:
        print(error)
    jax.distributed.shutdown()
    assert not manager.preempted(4)
    os.kill(os.getpid(), signal.SIGTERM)
    assert manager.preempted(5)
    """
    result = run(code)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert "jax_enable_preemption_service" in first
    assert "after jax.distributed.initialize()" in second
