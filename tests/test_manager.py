"""The manager: numbers, failures, what is restored."""

# ruff: noqa: F811  (fixtures are imported, and named again as arguments)

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings

import numpy as np
import pytest
from managing import Manager, broken, gate, hidden, tree, value  # noqa: F401  (fixtures)

import jaxckpt
from jaxckpt.writer import writer

# Nothing is written by who only reads


def test_a_manager_that_only_reads_writes_nothing(tmp_path):
    with Manager(tmp_path / "new", max_to_keep=1) as manager:
        given = tree(7)
        got, status = manager.restore(given)
        assert got["w"] is given["w"]
        assert not status.restored
        assert (manager.steps, manager.checkpoints, manager.latest_checkpoint) == ([], [], None)
        assert manager.should_save(1)
        assert "0 steps" in repr(manager)
        manager.wait()
    assert not (tmp_path / "new").exists()
    jaxckpt.save(tmp_path / "ckpt-1", tree())
    before = sorted(os.listdir(tmp_path))
    with Manager(tmp_path, max_to_keep=1) as manager:
        manager.restore(tree()).status.assert_consumed()
        assert manager.info(1).step == 1
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(ValueError, match="checkpoint_name"):
        Manager(tmp_path, checkpoint_name=name)


@pytest.mark.parametrize(
    "options", [{"max_to_keep": 0}, {"keep_best": 1}, {"save_every": 0}, {"on_busy": "drop"}, {"mode": "min"}]
)
def test_wrong_options_raise_at_once(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Manager(tmp_path, **options)


def test_integers_of_any_kind(tmp_path):
    kinds = {"max_to_keep": np.int64(2), "keep_every": np.int32(5), "keep_best": np.uint8(1)}
    with Manager(tmp_path, **kinds, metric="loss", mode="min", save_every=np.int16(2)) as manager:
        for step in range(1, 12):
            manager.save(tree(), step=step, metrics={"loss": -step if step == 4 else step})
        manager.wait()
        assert manager.steps == [4, 8, 10]
    for wrong in (True, 2.0, np.float32(2), np.ones(2, int)):
        with pytest.raises(TypeError, match="max_to_keep must be an int"):
            Manager(tmp_path, max_to_keep=wrong)


# Busy, and limits


def test_only_its_own_saves_make_a_manager_busy(tmp_path, gate):
    with Manager(tmp_path / "1", on_busy="skip") as one, Manager(tmp_path / "2", on_busy="skip") as other:
        first = one.save({"n": 1})
        assert one.save({"n": 2}) is None
        second = other.save({"n": 1})  # is not skipped: it queues behind the other's
        assert other.save({"n": 2}) is None
        assert not first.done()
        threading.Timer(0.05, gate.set).start()
        assert one.save({"n": 2}, force=True).result().step == 2
        assert second.result().step == 1
    with Manager(tmp_path / "3", on_busy="skip") as manager:
        gate.clear()
        by_hand = jaxckpt.save_async(tmp_path / "by-hand", {"n": 1})
        future = manager.save({"n": 1})
        gate.set()
        assert future.result().step == 1
        by_hand.result()


def test_the_memory_limit_is_that_of_restores_too(tmp_path, monkeypatch):
    from jaxckpt import manager as module

    limits = []

    def restore(path, **options):
        limits.append(options.get("memory_limit"))
        return jaxckpt.restore(path, **options)

    monkeypatch.setattr(module, "restore", restore)
    with Manager(tmp_path, memory_limit=1 << 20) as manager:
        assert value(manager.restore(tree(4))) == 4
        manager.save(tree(3), step=1).result()
        assert value(manager.restore(tree())) == 3
        assert value(manager.restore(tree(), step=1, memory_limit=5000)) == 3
        assert float(manager.restore_or_initialize(lambda: {"w": np.zeros(3)}).tree["w"][0]) == 3
    assert value(Manager(tmp_path).restore(tree())) == 3
    assert limits == [1 << 20, 1 << 20, 5000, 1 << 20, None]


# Numbers


def test_numbers_and_steps(tmp_path):
    with Manager(tmp_path) as manager:
        reports = [
            manager.save(tree(), step=step).result() for step in (None, 5, None, np.int64(20), 0, None)
        ]
        assert [report.step for report in reports] == [1, 5, 6, 20, 0, 21]
        assert manager.steps == [1, 5, 6, 20, 0, 21]
        assert [manager.info(step).sequence for step in manager.steps] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(TypeError, match="step must be an integer"):
            manager.save(tree(), step=1.5)
        with pytest.raises(ValueError, match="negative"):
            manager.save(tree(), step=-1)


@pytest.mark.parametrize("lost", [False, True])
def test_a_number_is_never_used_again(tmp_path, lost):
    """Nor when its checkpoint is gone, and the state file with it, as long as a later one remembers."""
    with Manager(tmp_path, max_to_keep=1) as manager:
        for step in (10, 30, 11):
            manager.save(tree(), step=step)
        manager.wait()
        assert manager.steps == [11]
    if lost:
        os.remove(tmp_path / "checkpoint")
    with Manager(tmp_path, max_to_keep=1) as manager:
        manager.restore(tree()).status.assert_consumed()
        assert manager.save(tree()).result().step == 31
        assert manager.info(31).sequence == 4


def test_a_number_is_not_used_again_after_all_are_deleted(tmp_path):
    with Manager(tmp_path) as manager:
        manager.save(tree()).result()
        manager.save(tree()).result()
        manager.delete(1)
        manager.delete(2)
        assert manager.latest_checkpoint is None
        assert value(manager.restore(tree(5))) == 5
    with Manager(tmp_path) as manager:
        assert manager.save(tree()).result().step == 3


def test_a_delete_while_the_state_is_lost_remembers(tmp_path):
    with Manager(tmp_path) as manager:
        manager.save(tree()).result()
    os.remove(tmp_path / "checkpoint")
    Manager(tmp_path).delete(1)
    with Manager(tmp_path) as manager:
        assert manager.save(tree()).result().step == 2


def test_what_is_under_way_has_its_number(tmp_path, gate):
    with Manager(tmp_path) as manager:
        first = manager.save({"n": 1})
        second = manager.save({"n": 2})
        with pytest.raises(jaxckpt.CheckpointExistsError, match="is being written"):
            manager.save({"n": 3}, step=2)
        assert manager.steps == []
        assert manager.latest_checkpoint is None
        gate.set()
        assert (first.result().step, second.result().step) == (1, 2)


def test_a_step_that_exists(tmp_path):
    with Manager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(tree(step), step=step).result()
        with pytest.raises(jaxckpt.CheckpointExistsError, match="ckpt-1"):
            manager.save(tree(9), step=1)
        assert value(manager.restore(tree())) == 2
        manager.save(tree(9), step=1, overwrite=True).result()
        assert manager.steps == [2, 1]  # what was committed last is the newest
        assert value(manager.restore(tree())) == 9
        assert manager.save(tree()).result().step == 3


# Failures


def test_a_failed_save_uses_up_no_number_and_raises_once(tmp_path, broken):
    manager = Manager(tmp_path)
    manager.save(tree()).result()
    broken.set()
    future = manager.save(tree())
    while not future.done():
        time.sleep(0.001)
    broken.clear()
    with pytest.raises(OSError, match="No space") as caught:
        manager.save(tree())
    assert "ckpt-2" in "".join(caught.value.__notes__)
    assert manager.save(tree()).result().path.endswith("ckpt-2")
    assert manager.info(2).sequence == 2
    manager.wait()
    manager.close()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("last", ["wait", "close", "__exit__"])
def test_a_failed_save_raises_at_the_end(tmp_path, broken, last):
    manager = Manager(tmp_path)
    broken.set()
    manager.save(tree())
    with pytest.raises(OSError, match="No space"):
        getattr(manager, last)(*((None, None, None) if last == "__exit__" else ()))
    manager.close()
    manager.close()


def test_a_failure_that_was_seen_is_not_raised_again(tmp_path, broken):
    with Manager(tmp_path) as manager:
        broken.set()
        with pytest.raises(OSError, match="No space"):
            manager.save(tree()).result()
        broken.clear()
        assert manager.save(tree()).result().step == 1


def test_all_failures_are_told(tmp_path, broken):
    manager = Manager(tmp_path)
    broken.set()
    manager.save({"n": 1})
    manager.save({"n": 1})
    with pytest.raises(OSError, match="No space") as caught:
        manager.close()
    notes = "".join(caught.value.__notes__)
    assert "ckpt-1" in notes
    assert "ckpt-2" in notes


def test_after_a_failed_save_the_next_call_is_due(tmp_path, broken):
    with Manager(tmp_path, save_every=10) as manager:
        manager.save(tree(), step=10).result()
        broken.set()
        with pytest.raises(OSError, match="No space"):
            manager.save(tree(), step=20).result()
        broken.clear()
        manager.wait()
        assert manager.save(tree(), step=21).result().step == 21
        assert manager.save(tree(), step=22) is None


def test_what_cannot_be_saved_raises_from_the_call(tmp_path):
    with Manager(tmp_path) as manager:
        with pytest.raises(jaxckpt.UnsupportedLeafError):
            manager.save({"a": {1, 2}})
        with pytest.raises(TypeError, match="metadata"):
            manager.save(tree(), metadata=object())
        assert manager.save(tree()).result().step == 1


def test_an_error_in_the_block_still_waits_and_stays_itself(tmp_path, gate, broken):
    with pytest.raises(ZeroDivisionError) as caught, Manager(tmp_path) as manager:  # noqa: PT012
        manager.save({"n": 1})
        threading.Timer(0.05, gate.set).start()
        1 / 0
    assert manager.steps == [1]
    assert not hasattr(caught.value, "__notes__")
    broken.set()
    with pytest.raises(ZeroDivisionError) as caught, Manager(tmp_path) as manager:  # noqa: PT012
        manager.save({"n": 1})
        1 / 0
    assert "could not be saved" in caught.value.__notes__[0]
    [future] = (
        writer.unseen()
    )  # whoever handles the other error may not see this, so that the exit code tells
    assert isinstance(future.exception(), OSError)


def test_a_closed_one_can_be_read_only(tmp_path):
    with Manager(tmp_path) as manager:
        manager.save(tree(3))
    for call in (lambda: manager.save(tree()), lambda: manager.delete(1)):
        with pytest.raises(ValueError, match="is closed"):
            call()
    assert manager.steps == [1]
    assert value(manager.restore(tree())) == 3


# Restoring


def test_a_rewind(tmp_path):
    with Manager(tmp_path) as manager:
        for step in (10, 20, 30):
            manager.save(tree(step), step=step)
        with pytest.warns(jaxckpt.NewerCheckpointsWarning, match="ckpt-20, ckpt-30") as caught:
            assert value(manager.restore(tree(), step=10)) == 10
        assert caught[0].filename == __file__
        assert value(manager.restore(tree(), step=10)) == 10  # told once
        assert value(manager.restore(tree(), step=30)) == 30
        manager.save(tree(11), step=11).result()
        assert manager.latest_checkpoint.endswith("ckpt-11")
        assert jaxckpt.latest_checkpoint(tmp_path).endswith("ckpt-11")
        assert value(manager.restore(tree())) == 11
        assert value(manager.restore(tree(), step=11)) == 11


def test_steps_that_are_not_there(tmp_path):
    with Manager(tmp_path) as manager:
        with pytest.raises(jaxckpt.CheckpointNotFoundError, match="it has no steps"):
            manager.restore(tree(), step=4)
        for step in (7, 3):
            manager.save(tree(), step=step)
        for call in (
            manager.info,
            manager.pin,
            manager.unpin,
            manager.delete,
            lambda s: manager.restore(tree(), step=s),
        ):
            with pytest.raises(jaxckpt.CheckpointNotFoundError, match="step 4; the steps there are 3, 7"):
                call(4)


def test_what_is_under_way_is_awaited(tmp_path, gate):
    with Manager(tmp_path) as manager:
        manager.save({"n": 1}, step=5)
        threading.Timer(0.05, gate.set).start()
        assert manager.restore({"n": 0}, step=5).tree == {"n": 1}


def test_a_mismatch_is_no_reason_to_take_an_older_one(tmp_path):
    with Manager(tmp_path) as manager:
        manager.save({"w": 1})
        manager.save({"v": 1})
        with pytest.raises(jaxckpt.RestoreError):
            manager.restore({"w": 0})


def test_a_later_releases_newest_is_not_passed_over(tmp_path):
    with Manager(tmp_path) as manager:
        manager.save(tree())
        manager.save(tree())
    path = tmp_path / "ckpt-2" / "graph.json"
    from test_state import resealed

    path.write_bytes(resealed(path.read_bytes().replace(b'{"jaxckpt":1,', b'{"jaxckpt":2,', 1)))
    manager = Manager(tmp_path)
    for call in (lambda: manager.restore(tree()), lambda: manager.info(2)):
        with pytest.raises(jaxckpt.UnsupportedFormatError, match="upgrade jaxckpt"):
            call()
    assert manager.steps == [1, 2]


def test_the_newest_is_pruned_between_listing_and_opening(tmp_path, monkeypatch):
    from jaxckpt import manager as module

    with Manager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(tree(step), step=step).result()
        calls = []

        def restore(path, **options):
            calls.append(path)
            if len(calls) == 1:  # the trainer goes on meanwhile
                shutil.rmtree(path)
                shutil.copytree(tmp_path / "ckpt-1", tmp_path / "ckpt-3")
            return jaxckpt.restore(path, **options)

        monkeypatch.setattr(module, "restore", restore)
        manager.restore(tree()).status.assert_consumed()
        assert len(calls) == 2


def test_damage_to_a_manifest(tmp_path):
    with Manager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(tree(step), step=step)
    (tmp_path / "ckpt-2" / "graph.json").write_bytes(b"torn")
    manager = Manager(tmp_path)
    with pytest.raises(jaxckpt.CorruptCheckpointError, match=r"graph\.json"):
        manager.info(2)
    with pytest.warns(jaxckpt.CorruptCheckpointWarning, match="ckpt-2"):
        assert manager.latest_checkpoint.endswith("ckpt-1")
    with pytest.warns(jaxckpt.CorruptCheckpointWarning, match="ckpt-2") as caught:
        assert value(manager.restore(tree())) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings(), Manager(tmp_path, max_to_keep=1) as manager:
        warnings.simplefilter("ignore")
        manager.save(tree(3)).result()
        assert manager.steps == [3]  # the state file knew whose it was


def test_another_name_for_the_same_run(tmp_path):
    """Finding nothing would mean to start afresh in silence."""
    with Manager(tmp_path, checkpoint_name="model") as manager:
        manager.save(tree(1)).result()
        jaxckpt.save(tmp_path / "export", tree(2))
        assert value(manager.restore(tree())) == 1  # an export beside the run is not the run
    with Manager(tmp_path) as manager:
        assert manager.steps == []
        assert value(manager.restore(tree())) == 2  # no step of this name: what was committed last
        manager.save(tree(3)).result()
        assert value(manager.restore(tree())) == 3
        assert len(manager.checkpoints) == 3
