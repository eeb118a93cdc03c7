"""What people ran into with directories of checkpoints: whose they are, queues, metrics, pins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt

TREE = {"w": jnp.ones(2)}


def saved(manager, times=1, tree=TREE):
    for _ in range(times):
        manager.save(tree)
    manager.wait()


def entries(directory):
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


# Whose checkpoints are these? tensorflow/tensorflow#34234, #16215, #16025


def test_a_restarted_run_goes_on_with_its_predecessors_retention(tmp_path):
    make = lambda: jaxckpt.CheckpointManager(tmp_path, max_to_keep=2)
    with make() as manager:
        saved(manager, 3)
        assert manager.steps == [2, 3]
    jaxckpt.save(tmp_path / "ckpt-100", TREE)
    jaxckpt.save(tmp_path / "mine", TREE)
    with make() as manager:
        saved(manager, 3)
    os.remove(tmp_path / "checkpoint")
    with make() as manager:
        saved(manager)
        assert manager.steps == [100, 103, 104]
        assert entries(tmp_path) == ["checkpoint", "ckpt-100", "ckpt-103", "ckpt-104", "mine"]


def test_what_others_put_there_is_never_deleted(tmp_path):
    (tmp_path / "ckpt-7").mkdir()  # looks like one, and is none
    (tmp_path / "ckpt-7" / "notes.txt").write_text("keep")
    (tmp_path / "ckpt-8").write_text("a file")
    (tmp_path / "logs").mkdir()
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        saved(manager, 3)
        assert len(manager.steps) == 1
        assert manager.steps[0] > 8  # numbers in use are not used again
    assert (tmp_path / "ckpt-7" / "notes.txt").read_text() == "keep"
    assert (tmp_path / "ckpt-8").read_text() == "a file"
    assert (tmp_path / "logs").is_dir()


def test_other_names_are_other_managers_business(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1, checkpoint_name="best") as manager:
        saved(manager, 2)
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        saved(manager, 2)
    left = [name for name in entries(tmp_path) if name != "checkpoint"]
    assert [name for name in left if name.startswith("best")] == ["best-2"]
    assert len([name for name in left if name.startswith("ckpt")]) == 1


def test_a_smaller_max_to_keep_deletes_the_rest(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        saved(manager, 5)
        assert manager.steps == [1, 2, 3, 4, 5]
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=2) as manager:
        saved(manager)
        assert manager.steps == [5, 6]


def test_a_reader_of_the_directory_deletes_nothing(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        saved(manager, 3)
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        manager.restore(TREE).status.assert_consumed()
        assert manager.steps == [1, 2, 3]
    assert jaxckpt.CheckpointManager(tmp_path).steps == [1, 2, 3]


# Saves asked for faster than the disk: apax-hub/apax#22, google/orbax#392


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The highest resident size while it is open, sampled."""

    def __enter__(self):
        self.start = self.highest = resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._ended.wait(0.002):
            self.highest = max(self.highest, resident())

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()

    @property
    def growth(self):
        return self.highest - self.start


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_saves_in_flight_are_bounded(tmp_path):
    size, number = 32 << 20, 10
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=2) as manager, Peak() as peak:
        futures = [manager.save({"w": np.full(size // 8, float(step))}, step=step) for step in range(number)]
        manager.wait()
        reports = [future.result() for future in futures]
        assert manager.steps == [number - 2, number - 1]
    assert peak.growth < 3.5 * size
    assert [report.step for report in reports] == list(range(number))
    assert sum(report.seconds_blocked for report in reports) > 0
    last, _ = jaxckpt.restore(tmp_path / f"ckpt-{number - 1}", {"w": np.zeros(size // 8)})
    assert (last["w"] == number - 1).all()


def test_commits_come_in_order_whatever_the_sizes(tmp_path):
    order: list[int] = []
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        for step, size in enumerate([1 << 20, 1, 1 << 18, 1]):
            future = manager.save({"w": np.ones(size)}, step=step)
            future.add_done_callback(lambda future: order.append(future.result().step))
        manager.wait()
        assert order == manager.steps == [0, 1, 2, 3]
        sequences = [manager.info(step).sequence for step in manager.steps]
    assert sequences == sorted(set(sequences))


def test_a_busy_manager_may_skip(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path, on_busy="skip") as manager:
        futures = [manager.save({"w": np.full(1 << 21, float(step))}, step=step) for step in range(6)]
        kept = [step for step, future in enumerate(futures) if future is not None]
        assert len(kept) < 6  # 16 MiB take longer than the call
        assert manager.save({"w": np.zeros(1)}, step=10, force=True) is not None
        manager.wait()
        assert manager.steps == [*kept, 10]


def test_save_async_is_bounded_too(tmp_path):
    futures = [jaxckpt.save_async(tmp_path / f"{i}", {"w": np.full(1 << 20, float(i))}) for i in range(5)]
    assert sum(not future.done() for future in futures) <= 2
    assert [future.result(60).path for future in futures] == [str(tmp_path / f"{i}") for i in range(5)]


# Metrics as people have them: SlopDotCash/asi#989, antonioterpin/flowgym PR 51


def test_metrics_of_every_kind(tmp_path):
    make = lambda: jaxckpt.CheckpointManager(tmp_path, max_to_keep=1, keep_best=1, metric="loss", mode="min")
    given = [
        {"loss": jnp.float32(0.5)},
        {"loss": float("nan")},
        {"loss": np.float64("inf")},
        None,
        {"acc": 1},
    ]
    with make() as manager:
        for step, metrics in enumerate(given, 1):
            manager.save(TREE, step=step, metrics=metrics)
    with make() as manager:
        assert manager.best.endswith("-1")
        assert manager.steps == [1, 5]
        manager.save(TREE, step=6, metrics={"loss": np.float32(0.25)})
        manager.wait()
        assert manager.best.endswith("-6")
        assert manager.steps == [6]
    with make() as manager:
        assert manager.best.endswith("-6")
        assert manager.info(6).metrics == {"loss": 0.25}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_no_number_is_never_the_best(tmp_path, mode, bad):
    """Neither by "min", by which -inf would win, nor by "max"; also after the state file is lost."""
    options = {"keep_best": 1, "max_to_keep": 1, "metric": lambda m: m.get("loss"), "mode": mode}
    with jaxckpt.CheckpointManager(tmp_path, **options) as manager:
        for step, value in enumerate([1.0, bad, 1.5, bad]):
            manager.save(TREE, step=step, metrics={} if value is None else {"loss": value})
    os.remove(tmp_path / "checkpoint")
    manager = jaxckpt.CheckpointManager(tmp_path, **options)
    assert manager.steps == [0 if mode == "min" else 2, 3]
    assert manager.best.endswith("-0" if mode == "min" else "-2")


@pytest.mark.parametrize("value", ["low", [1.0], {"x": 1}, jnp.ones(2), object()])
def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path, value):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        with pytest.raises((TypeError, ValueError), match="accuracy"):
            manager.save(TREE, metrics={"loss": 1.0, "accuracy": value})
        assert manager.save(TREE, metrics={"loss": 1, "ok": True}).result().path.endswith("-1")


def test_metrics_do_not_spoil_the_state_file(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        saved(manager)
        manager.save(TREE, metrics={"a": float("nan"), "b": float("-inf"), "c": 1e308})
        manager.wait()
    json.loads((tmp_path / "checkpoint").read_text(), parse_constant=pytest.fail)
    metrics = jaxckpt.CheckpointManager(tmp_path).info(2).metrics
    assert np.isnan(metrics["a"])
    assert metrics["b"] == float("-inf")
    assert metrics["c"] == 1e308


# Pinning from another process while training runs: marin-community/levanter PR 1000


def elsewhere(code, *arguments):
    """Runs a program in another process; it sees the same checkpoints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


PIN = """
    import sys, jaxckpt
    manager = jaxckpt.CheckpointManager(sys.argv[1])
    for argument in sys.argv[2:]:
        getattr(manager, argument.split("=")[0])(int(argument.split("=")[1]))
    """


def test_a_pin_beside_a_live_trainer(tmp_path):
    manager = jaxckpt.CheckpointManager(tmp_path, max_to_keep=1)
    manager.save(TREE, step=1)
    manager.wait()
    elsewhere(PIN, tmp_path, "pin=1")
    for step in (2, 3):
        manager.save(TREE, step=step)
    manager.wait()
    assert manager.steps == [1, 3]
    assert manager.info(1).pinned
    assert not manager.info(3).pinned
    assert jaxckpt.CheckpointManager(tmp_path).steps == [1, 3]  # rewrites of the state file lost nothing
    elsewhere(PIN, tmp_path, "unpin=1", "pin=3")
    manager.save(TREE, step=4)
    manager.wait()
    assert manager.steps == [3, 4]
    manager.close()
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        saved(manager)
        assert manager.steps == [3, 5]


def test_a_pin_while_a_save_is_being_written(tmp_path):
    """The trainer asks again just before it deletes."""
    manager = jaxckpt.CheckpointManager(tmp_path, max_to_keep=1)
    manager.save(TREE, step=1)
    manager.wait()
    future = manager.save({"w": np.ones(1 << 22)}, step=2)
    jaxckpt.CheckpointManager(tmp_path).pin(1)
    future.result()
    manager.close()
    assert jaxckpt.CheckpointManager(tmp_path).steps == [1, 2]


def test_pins_of_steps_that_are_not_there(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        saved(manager)
        with pytest.raises(jaxckpt.CheckpointNotFoundError, match="7"):
            manager.pin(7)
        manager.pin(1)
        manager.pin(1)
        manager.unpin(1)
        saved(manager)
        assert manager.steps == [2]


def test_an_evaluation_job_never_meets_a_pruned_path(tmp_path):
    with jaxckpt.CheckpointManager(tmp_path, max_to_keep=1) as manager:
        saved(manager)
        for path in jaxckpt.checkpoints_iterator(tmp_path, timeout=0):
            saved(manager, 3)
            assert os.path.isdir(path)
            jaxckpt.restore(path, TREE).status.assert_consumed()
            break
        started = time.monotonic()
        assert len(list(jaxckpt.checkpoints_iterator(tmp_path, timeout=0.1))) == 1
        assert time.monotonic() - started < 10
