"""Pins and holds: what retention leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from jaxckpt.errors import CheckpointNotFoundError
from jaxckpt.storage import pins, process
from jaxckpt.storage.heartbeat import DEAD_SECONDS, Watch, to_json
from jaxckpt.storage.pins import Hold

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning"),
]


def make(directory, *names):
    for name in names:
        (directory / name).mkdir(parents=True)
        (directory / name / "graph.json").write_text("x")
    return str(directory)


def folder(directory):
    return directory / ".jaxckpt" / "pins"


def visible(directory):
    return sorted(name for name in os.listdir(directory) if name != ".jaxckpt")


def kept(directory, name):
    return lambda: name in pins.pinned(directory) | pins.held(directory, Watch())


def test_pin_and_unpin(tmp_path):
    d = make(tmp_path, "ckpt-1", "ckpt-2", "odd.pin")
    assert pins.pinned(d) == set()
    pins.pin(d, "ckpt-1")
    pins.pin(d, "ckpt-1")
    pins.pin(d, "odd.pin")
    assert pins.pinned(d) == {"ckpt-1", "odd.pin"}
    pins.unpin(d, "ckpt-1")
    pins.unpin(d, "ckpt-1")
    assert pins.pinned(d) == {"odd.pin"}
    assert pins.held(d, Watch()) == set()


def test_what_is_not_there_cannot_be_pinned_nor_held(tmp_path):
    d = make(tmp_path, "ckpt-1")
    with pytest.raises(CheckpointNotFoundError, match="ckpt-2"):
        pins.pin(d, "ckpt-2")
    with pytest.raises(CheckpointNotFoundError, match="ckpt-2"):
        Hold(d, "ckpt-2")
    assert os.listdir(folder(tmp_path)) == []
    assert pins.pinned(str(tmp_path / "nowhere")) == set()
    assert pins.held(str(tmp_path / "nowhere"), Watch()) == set()


def test_a_hold_lasts_until_it_is_released(tmp_path):
    d = make(tmp_path, "ckpt-1")
    first, second = Hold(d, "ckpt-1"), Hold(d, "ckpt-1")
    assert pins.held(d, Watch()) == {"ckpt-1"}
    first.release()
    first.renew()  # by the thread that was just about to: too late
    assert pins.held(d, Watch()) == {"ckpt-1"}
    second.release()
    second.release()
    assert os.listdir(folder(tmp_path)) == []


def test_a_hold_lapses_with_its_process(tmp_path):
    d = make(tmp_path, "ckpt-1")
    code = (
        "import sys, os; from jaxckpt.storage.pins import Hold; h = Hold(sys.argv[1], 'ckpt-1'); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, d], check=True, env=environment)
    assert len(os.listdir(folder(tmp_path))) == 1
    assert pins.held(d, Watch()) == set()
    assert os.listdir(folder(tmp_path)) == []


def test_a_forked_child_leaves_what_its_parent_holds(tmp_path):
    d = make(tmp_path, "ckpt-1")
    hold = Hold(d, "ckpt-1")
    pid = os.fork()
    if pid == 0:
        hold.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert pins.held(d, Watch()) == {"ckpt-1"}
    hold.release()


def test_a_hold_elsewhere_lapses_after_silence(tmp_path):
    d = make(tmp_path, "ckpt-1")
    folder(tmp_path).mkdir(parents=True)
    now = [0.0]
    watch = Watch(lambda: now[0])
    file = folder(tmp_path) / "ckpt-1.abcd.hold"
    fields = {"process": to_json(replace(process.current(), boot="another")), "renewals": 0}
    for data in (json.dumps(fields), "no json", "[]"):
        file.write_text(data)
        for _ in range(3):  # renewed in time
            assert pins.held(d, watch) == {"ckpt-1"}
            now[0] += DEAD_SECONDS - 1
            file.write_text(file.read_text() + " ")
        assert pins.held(d, watch) == {"ckpt-1"}
        now[0] += DEAD_SECONDS + 1
        assert pins.held(d, watch) == set()
        assert not file.exists()


def test_remove(tmp_path):
    d = make(tmp_path, "ckpt-1", "ckpt-2")
    assert pins.remove(d, "ckpt-1", is_kept=kept(d, "ckpt-1"))
    assert visible(tmp_path) == ["ckpt-2"]
    pins.pin(d, "ckpt-2")
    assert not pins.remove(d, "ckpt-2", is_kept=kept(d, "ckpt-2"))
    assert visible(tmp_path) == ["ckpt-2"]
    with pytest.raises(FileNotFoundError):
        pins.remove(d, "ckpt-1", is_kept=lambda: False)
    assert visible(tmp_path) == ["ckpt-2"]


def test_a_pin_at_the_last_moment_brings_it_back(tmp_path):
    d = make(tmp_path, "ckpt-1")
    answers = iter([False, True])
    assert not pins.remove(d, "ckpt-1", is_kept=lambda: next(answers))
    assert visible(tmp_path) == ["ckpt-1"]
    assert (tmp_path / "ckpt-1" / "graph.json").read_text() == "x"


def test_when_it_cannot_be_told_whether_it_is_pinned_it_stays(tmp_path):
    d = make(tmp_path, "ckpt-1")
    answers = iter([False])

    def is_kept():
        try:
            return next(answers)
        except StopIteration:
            raise OSError("away") from None

    with pytest.raises(OSError, match="away"):
        pins.remove(d, "ckpt-1", is_kept=is_kept)
    assert visible(tmp_path) == ["ckpt-1"]


def test_one_of_pin_and_remove_always_sees_the_other(tmp_path):
    """Whatever the order: a pin that returned holds."""
    outcomes = set()
    for attempt in range(40):
        name = f"ckpt-{attempt}"
        d = make(tmp_path, name)
        pinned = []

        def pin(d=d, name=name, pinned=pinned):
            try:
                pins.pin(d, name)
                pinned.append(name)
            except CheckpointNotFoundError:
                pass

        thread = threading.Thread(target=pin)
        thread.start()
        removed = pins.remove(d, name, is_kept=kept(d, name))
        thread.join()
        assert removed != bool(pinned) or not removed
        assert os.path.isdir(tmp_path / name) != removed
        if pinned:
            assert os.path.isdir(tmp_path / name)
        outcomes.add(removed)
    assert outcomes
