"""The manager: what goes, and who may write."""

# ruff: noqa: F811  (fixtures are imported, and named again as arguments)

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
from managing import Manager, broken, gate, hidden, tree, value  # noqa: F401  (fixtures)
from test_writer import run

import jaxckpt
from jaxckpt.storage import directory as directories
from jaxckpt.storage import lease, pins, process, state
from jaxckpt.storage.lease import Holder

# Python and jax warn when a program with threads forks: here that is what is tried.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning"),
]


# What goes


def test_info(tmp_path):
    with Manager(tmp_path, metric="loss", mode="min") as manager:
        before = time.time()
        manager.save(tree(), step=4, metrics={"loss": 0.5}, metadata={"lr": [1, None]}).result()
        info = manager.info(4)
        assert info.path == str(tmp_path / "ckpt-4")
        assert (info.step, info.sequence, info.pinned, info.format) == (4, 1, False, "jaxckpt")
        assert info.metrics == {"loss": 0.5}
        assert info.metadata == {"lr": [1, None]}
        assert info.nbytes >= 24
        assert before <= info.time <= time.time()
        assert manager.best == info.path
        manager.pin(4)
        assert manager.info(4).pinned
    assert Manager(tmp_path).info(4) == manager.info(4)
    with pytest.raises(ValueError, match="metric="):
        Manager(tmp_path).best


def test_keep_sees_what_may_go_and_decides(tmp_path):
    seen = []

    def keep(infos):
        seen.append([info.step for info in infos])
        return [info for info in infos if info.metadata == "good"]

    with Manager(tmp_path, max_to_keep=1, keep=keep) as manager:
        jaxckpt.save(tmp_path / "mine", tree())
        for step in range(4):
            manager.save(tree(), step=step, metadata="good" if step == 1 else None)
        manager.wait()
        assert manager.steps == [1, 3]
    assert seen == [[0], [0, 1], [1, 2], [1, 2, 3]]


def test_an_error_in_keep_deletes_nothing(tmp_path):
    """The checkpoint is durable, so that its outcome is a report; the error is raised by what comes next."""
    manager = Manager(tmp_path, max_to_keep=1, save_every=10, keep=lambda infos: 1 / 0)
    for step in (1, 10):
        assert manager.save(tree(), step=step).result().step == step
        with pytest.raises(ZeroDivisionError) as caught:
            manager.save(tree(), step=step + 1)
        assert "durable" in "".join(caught.value.__notes__)
    assert manager.save(tree(), step=12) is None  # what is durable counts
    assert manager.steps == [1, 10]
    assert Manager(tmp_path).steps == [1, 10]
    assert len(json.loads((tmp_path / "checkpoint").read_text())["checkpoints"]) == 2
    manager.save(tree(), step=20)
    with pytest.raises(ZeroDivisionError):
        manager.close()


def test_an_error_in_keep_that_nobody_saw_ends_in_a_non_zero_exit(tmp_path):
    code = f"""
    import numpy as np, jaxckpt
    manager = jaxckpt.CheckpointManager({str(tmp_path / "d")!r}, max_to_keep=1, keep=lambda infos: 1 / 0)
    assert manager.save({{"w": np.ones(3)}}).result().step == 1
    """
    result = run(code)
    assert result.returncode == 120
    assert "ckpt-1 (it is durable" in result.stderr
    assert "division by zero" in result.stderr


def test_what_somebody_else_has_put_there_meanwhile_stays(tmp_path):
    """Between looking and deleting: only what the manager wrote is ever deleted."""
    jaxckpt.save(tmp_path / "elsewhere" / "mine", tree(7))

    def keep(infos):
        if len(infos) == 2:
            shutil.rmtree(infos[0].path)
            shutil.copytree(tmp_path / "elsewhere" / "mine", infos[0].path)
        return []

    with Manager(tmp_path / "run", max_to_keep=1, keep=keep) as manager:
        for step in (1, 2, 3):
            manager.save(tree(step), step=step).result()
        assert manager.steps == [1, 3]
        assert value(manager.restore(tree())) == 3
    assert jaxckpt.load_checkpoint(tmp_path / "run" / "ckpt-1")["w"][0] == 7


def test_what_is_saved_by_hand_again_and_again_keeps_its_place(tmp_path):
    """Also where the file system uses an inode a second time."""
    with Manager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(tree(step), step=step).result()
            for name in ("best", "best", "ckpt-9"):
                jaxckpt.save(tmp_path / name, tree(), overwrite=True)
        manager.save(tree(3), step=3).result()
        assert [os.path.basename(path) for path in manager.checkpoints] == [
            "ckpt-1", "ckpt-2", "best", "ckpt-9", "ckpt-3",
        ]  # fmt: skip
        assert manager.info(3).sequence == 9


def test_a_save_does_not_look_at_every_checkpoint_again(tmp_path, monkeypatch):
    """What one costs does not grow with how many are kept."""
    looked, encoded = [], []
    stamp, encode = state._stamp, state._encode
    monkeypatch.setattr(state, "_stamp", lambda path, *args: (looked.append(path), stamp(path, *args))[1])
    monkeypatch.setattr(state, "_encode", lambda row: (encoded.append(row.name), encode(row))[1])
    costs = []
    with Manager(tmp_path, max_to_keep=8) as manager:
        for step in range(1, 20):
            manager.save(tree(), step=step, metrics={"loss": 1}).result()
            costs.append((len(looked), len(encoded)))
            looked.clear()
            encoded.clear()
        assert max(costs[3:8]) <= costs[1]
        assert len(set(costs[10:])) == 1  # one goes each time; it is looked at before
        assert costs[-1][0] <= costs[1][0] + 1
        assert manager.steps == list(range(12, 20))
        looked.clear()
        manager.steps  # whoever asks is told what there is now
        assert len(looked) == 8
    assert state.load(str(tmp_path)) == state.view(str(tmp_path))


def test_a_copy_under_another_name_is_the_users(tmp_path):
    with Manager(tmp_path, max_to_keep=1) as manager:
        manager.save(tree()).result()
        shutil.copytree(tmp_path / "ckpt-1", tmp_path / "keep-me")
        shutil.copytree(tmp_path / "ckpt-1", tmp_path / "ckpt-900")
        for _ in range(2):
            manager.save(tree())
        manager.wait()
    assert sorted(n for n in os.listdir(tmp_path) if not n.startswith(".")) == [
        "checkpoint",
        "ckpt-900",
        "ckpt-902",
        "keep-me",
    ]


def test_one_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch):
    with Manager(tmp_path, max_to_keep=1) as manager:
        manager.save(tree()).result()
        remove = pins.remove

        def refuse(*args, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(pins, "remove", refuse)
        with pytest.warns(jaxckpt.CheckpointWarning, match="ckpt-1 could not be deleted"):
            manager.save(tree()).result()
        assert manager.steps == [1, 2]
        monkeypatch.setattr(pins, "remove", remove)
        manager.save(tree()).result()
        assert manager.steps == [3]


def test_a_full_disk_for_the_state_file_does_not_stop_the_run(tmp_path, monkeypatch):
    with Manager(tmp_path, max_to_keep=1) as manager:
        manager.save(tree()).result()
        monkeypatch.setattr(
            directories, "replace_file", lambda *args: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.warns(jaxckpt.CheckpointWarning, match="state file was not written"):
            manager.save(tree()).result()
        assert manager.steps == [2]


def test_delete(tmp_path):
    with Manager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(tree(step), step=step)
        manager.delete(3)
        assert manager.steps == [1, 2]
        assert value(manager.restore(tree())) == 2
        manager.pin(1)
        with pytest.raises(ValueError, match=r"is pinned: unpin\(1\)"):
            manager.delete(1)
        hold = pins.Hold(str(tmp_path), "ckpt-2")
        with pytest.raises(jaxckpt.DirectoryInUseError, match="held by a reader"):
            manager.delete(2)
        hold.release()
        jaxckpt.save(tmp_path / "ckpt-9", tree())
        with pytest.raises(ValueError, match="by hand"):
            manager.delete(9)
        assert manager.steps == [1, 2, 9]
    other = Manager(tmp_path)
    other.delete(2)
    assert not (tmp_path / lease.FOLDER / "lease").exists()  # deleting makes nobody the writer
    assert hidden(tmp_path) == []


def test_a_reader_holds_what_it_reads(tmp_path):
    with Manager(tmp_path, max_to_keep=1) as manager:
        manager.save(tree()).result()
        iterator = jaxckpt.checkpoints_iterator(tmp_path, timeout=5)
        assert next(iterator).endswith("ckpt-1")
        for _ in range(2):
            manager.save(tree()).result()
        assert manager.steps == [1, 3]
        assert next(iterator).endswith("ckpt-3")
        manager.save(tree()).result()
        assert manager.steps == [3, 4]
        iterator.close()
        manager.save(tree()).result()
        assert manager.steps == [5]


def test_iterating_where_nothing_can_be_written(tmp_path, monkeypatch):
    jaxckpt.save(tmp_path / "ckpt-1", tree())

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pins, "Hold", refuse)
    with pytest.warns(jaxckpt.CheckpointWarning, match="nothing holds ckpt-1"):
        assert len(list(jaxckpt.checkpoints_iterator(tmp_path, timeout=0))) == 1
    with pytest.raises(ValueError, match="timeout"):
        jaxckpt.checkpoints_iterator(tmp_path, timeout=-1)


def test_an_interval_between_two_yields(tmp_path):
    with Manager(tmp_path) as manager:
        manager.save(tree()).result()
        times = []
        for _ in jaxckpt.checkpoints_iterator(tmp_path, timeout=0, min_interval=0.2):
            times.append(time.monotonic())
            if len(times) == 2:
                break
            manager.save(tree()).result()
    assert times[1] - times[0] > 0.19


# Who writes


def test_tensorflows_directory_is_never_written_to(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "ckpt-3"\n')
    (tmp_path / "ckpt-3.index").write_text("x")
    with Manager(tmp_path) as manager:
        with pytest.raises(jaxckpt.UnsupportedFormatError, match="TensorFlow"):
            manager.save(tree())
        with pytest.raises(jaxckpt.UnsupportedFormatError, match="TensorFlow"):
            manager.pin(1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-3.index"]


def test_who_lost_the_lease_commits_nothing(tmp_path, gate):
    """A process that was stopped for a while, and another host took over."""
    manager = Manager(tmp_path)
    future = manager.save({"n": 1})
    other = Holder(process=replace(process.current(), boot="other", host="far"), token="t")
    (tmp_path / lease.FOLDER / "lease").write_bytes(other.encode())
    gate.set()
    with pytest.raises(jaxckpt.DirectoryInUseError, match=f"process {os.getpid()} on far"):
        future.result()
    assert manager.steps == []
    assert hidden(tmp_path) == []
    manager.close()
    assert (tmp_path / lease.FOLDER / "lease").read_bytes() == other.encode()


def test_a_takeover_in_one_process_loses_nothing(tmp_path, gate):
    old = Manager(tmp_path)
    futures = [old.save({"n": 1}), old.save({"n": 2})]
    threading.Timer(0.05, gate.set).start()
    new = Manager(tmp_path)
    assert new.save({"n": 3}).result().step == 3
    assert [future.result().step for future in futures] == [1, 2]
    with pytest.raises(jaxckpt.DirectoryInUseError, match="newer CheckpointManager"):
        old.save({"n": 4})
    new.close()
    old.close()


def test_leftovers_of_the_dead_are_swept_at_the_first_save(tmp_path):
    pid = os.fork()
    if pid == 0:
        staging = directories.stage(str(tmp_path / "ckpt-1"))
        open(os.path.join(staging.path, "part"), "w").close()
        os._exit(0)
    os.waitpid(pid, 0)
    alive = directories.stage(str(tmp_path / "ckpt-9"))
    assert len(hidden(tmp_path)) == 2
    with Manager(tmp_path) as manager:
        assert len(hidden(tmp_path)) == 2
        manager.save(tree()).result()
    assert hidden(tmp_path) == [os.path.basename(alive.path)]


def test_a_forked_child_has_one_clear_error(tmp_path):
    """Whatever locks its parent's threads held: neither save nor anything else hangs."""
    manager = Manager(tmp_path)
    manager.save(tree(4)).result()
    with manager._turn, manager._ledger._looking, manager._ledger._acting, lease._in_process:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                try:
                    manager.save(tree())
                except jaxckpt.DirectoryInUseError as error:
                    code = 2 if "forked" in str(error) else 3
                assert manager.steps == [1]
                assert manager.latest_checkpoint.endswith("ckpt-1")
                manager.pin(1)
                manager.wait()
                manager.close()
                try:
                    Manager(tmp_path).save(tree())
                except jaxckpt.DirectoryInUseError:
                    code += 10
            finally:
                os._exit(code)
        deadline = time.monotonic() + 60
        done = (0, 0)
        while not done[0] and time.monotonic() < deadline:
            done = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
    assert done[0], "the child hangs"
    assert os.waitstatus_to_exitcode(done[1]) == 12
    assert manager.info(1).pinned
    assert manager.save(tree()).result().step == 2  # the child took nothing away
    manager.close()


def test_threads_share_a_manager(tmp_path):
    errors = []

    def work():
        try:
            for _ in range(4):
                manager.save(tree())
                assert manager.steps == sorted(manager.steps)
                manager.restore(tree()).status.assert_consumed()
        except BaseException as error:
            errors.append(error)

    with Manager(tmp_path, max_to_keep=3) as manager:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        manager.wait()
        assert manager.steps == [14, 15, 16]


def test_calls_are_counted_where_no_step_is_given(tmp_path):
    with Manager(tmp_path, save_every=3) as manager:
        saved = [call for call in range(1, 10) if manager.save(tree()) is not None]
        assert saved == [1, 3, 6, 9]
    with Manager(tmp_path, save_every=lambda step: step % 2 == 0) as manager:
        assert manager.save(tree()) is None  # it would be 5
        assert manager.save(tree(), force=True).result().step == 5
        assert manager.save(tree()).result().step == 6


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    with jaxckpt.CheckpointManager("ck") as manager:
        manager.save({"x": 1}, step=1)
        manager.wait()
        monkeypatch.chdir(tmp_path / "sub")
        assert manager.restore({"x": 0}).tree == {"x": 1}
        assert manager.restore({"x": 0}, step=1).tree == {"x": 1}


def test_a_tensorflow_directory_is_not_saved_into_by_hand(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "ckpt-1"\n')
    with pytest.raises(jaxckpt.UnsupportedFormatError, match="TensorFlow"):
        jaxckpt.save(tmp_path / "ckpt-1", {"x": 1})
