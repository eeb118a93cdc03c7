"""Staging, committing, sweeping: nothing half done is ever seen, and nobody else's files are touched."""

import errno
import os
import stat
import subprocess
import sys
import time

import pytest

from jaxckpt.errors import CheckpointExistsError, SaveError, UnsupportedFormatError
from jaxckpt.storage import directory, exchange, hidden, process
from jaxckpt.storage.directory import Staging, abandon, commit, replace_file, stage, sweep, write_file


def fill(staging, text="new"):
    os.makedirs(os.path.join(staging.path, "d"))
    write_file(os.path.join(staging.path, "graph.json"), text.encode())
    write_file(os.path.join(staging.path, "d", "x"), b"values")
    return staging


def read(path):
    return (path / "graph.json").read_text()


def test_a_commit_makes_the_checkpoint_appear_whole(tmp_path):
    target = tmp_path / "deep" / "er" / "ckpt-1"
    staging = fill(stage(str(target)))
    assert os.path.dirname(staging.path) == str(target.parent)
    assert directory.is_hidden(os.path.basename(staging.path))
    assert not target.exists()
    commit(staging)
    assert read(target) == "new"
    assert os.listdir(target.parent) == ["ckpt-1"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        commit(fill(stage(str(tmp_path / "c"))))
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "c").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(tmp_path / "c" / "graph.json").st_mode) == 0o640


def test_a_path_that_is_taken_is_kept(tmp_path):
    target = tmp_path / "c"
    commit(fill(stage(str(target)), "old"))
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        directory.check(str(target), overwrite=False)
    staging = fill(stage(str(target)))
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        commit(staging)
    assert read(target) == "old"
    abandon(staging)
    assert os.listdir(tmp_path) == ["c"]
    (tmp_path / "empty").mkdir()  # a plain rename would replace it
    staging = fill(stage(str(tmp_path / "empty")))
    with pytest.raises(CheckpointExistsError):
        commit(staging)


def test_overwriting_exchanges_and_then_removes(tmp_path, monkeypatch):
    target = tmp_path / "c"
    commit(fill(stage(str(target)), "old"))
    directory.check(str(target), overwrite=True)
    commit(fill(stage(str(target))), overwrite=True)
    assert read(target) == "new"
    assert os.listdir(tmp_path) == ["c"]
    commit(fill(stage(str(tmp_path / "fresh"))), overwrite=True)  # nothing there: an ordinary commit
    assert read(tmp_path / "fresh") == "new"
    staging = fill(stage(str(target)), "newer")
    monkeypatch.setattr(directory, "remove_tree", lambda path: None)  # killed just after the exchange
    commit(staging, overwrite=True)
    assert read(target) == "newer"
    assert sorted(os.listdir(tmp_path)) == sorted(["c", "fresh", os.path.basename(staging.path)])


def test_only_checkpoints_are_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    os.symlink(tmp_path / "home", tmp_path / "link")
    for name in ("home", "file", "link"):
        with pytest.raises(CheckpointExistsError, match="is no checkpoint"):
            directory.check(str(tmp_path / name), overwrite=True)
    directory.check(str(tmp_path / "absent"), overwrite=True)
    (tmp_path / "empty").mkdir()
    directory.check(str(tmp_path / "empty"), overwrite=True)


def test_where_directories_cannot_be_exchanged_it_says_so_before_writing(tmp_path, monkeypatch):
    target = tmp_path / "c"
    commit(fill(stage(str(target)), "old"))
    assert directory.can_exchange(str(tmp_path))
    assert os.listdir(tmp_path) == ["c"]
    assert not directory.can_exchange(str(tmp_path / "absent"))

    def refuse(first, second):
        raise NotImplementedError("no")

    monkeypatch.setattr(directory, "exchange", refuse)
    directory._can_exchange.cache_clear()
    with pytest.raises(UnsupportedFormatError, match="save to a new path"):
        directory.check(str(target), overwrite=True)
    staging = fill(stage(str(target)))
    with pytest.raises(SaveError, match="cannot be replaced"):
        commit(staging, overwrite=True)
    assert read(target) == "old"
    directory._can_exchange.cache_clear()


def test_renaming_without_the_systems_help_still_replaces_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no")

    monkeypatch.setattr(exchange, "_rename", refuse)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        exchange.rename_new(str(tmp_path / "a"), str(tmp_path / "b"))
    exchange.rename_new(str(tmp_path / "a"), str(tmp_path / "c"))
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_what_the_system_refuses_names_path_cause_and_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="file/ckpt"):
        stage(str(tmp_path / "file" / "ckpt"))
    staging = fill(stage(str(tmp_path / "c")))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="Free some space") as caught:
        commit(staging)
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)
    assert not (tmp_path / "c").exists()


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    staging, order = fill(stage(str(tmp_path / "c"))), []
    sync, rename = os.fsync, directory.rename_new
    inodes = {os.stat(staging.path).st_ino: "stage", os.stat(tmp_path).st_ino: "parent"}
    for name in ("d", "d/x", "graph.json"):
        inodes[os.stat(os.path.join(staging.path, name)).st_ino] = name
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(inodes[os.fstat(handle).st_ino]), sync(handle))
    )
    monkeypatch.setattr(directory, "rename_new", lambda a, b: (order.append("rename"), rename(a, b)))
    commit(staging)
    assert order[-3:] == ["stage", "rename", "parent"]
    assert order.index("d/x") < order.index("d") < order.index("stage")
    assert "graph.json" in order


def test_long_and_strange_names_fit(tmp_path):
    for name in ("x" * 250, "é" * 120, "-tmp-", "a b\n"):
        commit(fill(stage(str(tmp_path / name))))
        staging = stage(str(tmp_path / name))
        assert hidden._NAME.fullmatch(os.path.basename(staging.path).replace("\n", " "))
        assert len(os.fsencode(os.path.basename(staging.path))) <= 255
        abandon(staging)


CRASH = """
import os, sys
from jaxckpt.storage.directory import stage
staging = stage(sys.argv[1])
open(os.path.join(staging.path, "part"), "w").write("x")
print(staging.path, flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
os._exit(1)
"""


def crash(path, what="die"):
    return subprocess.Popen(
        [sys.executable, "-c", CRASH, str(path), what],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def test_leftovers_of_dead_processes_are_swept_and_nothing_else(tmp_path):
    dead, alive = crash(tmp_path / "ckpt-1"), crash(tmp_path / "ckpt-2", "wait")
    left, living = dead.stdout.readline().strip(), alive.stdout.readline().strip()
    dead.communicate()
    mine = stage(str(tmp_path / "ckpt-3"))
    elsewhere = os.path.basename(left).replace(hidden._boot_token(process.current()), "0" * 16)
    (tmp_path / elsewhere).mkdir()  # of another host: nobody knows
    foreign = [
        ".ckpt-1.tmp-123",
        ".hidden",
        "ckpt-9",
        ".x.jaxckpt-tmp-host-zz-1-2-3",
        "a.jaxckpt-tmp-h-" + "0" * 16 + "-1-2-" + "0" * 12,
    ]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / "ckpt-1.orbax-checkpoint-tmp").mkdir()
    try:
        assert sweep(str(tmp_path)) == [os.path.basename(left)]
        assert os.path.isdir(living)
        assert os.path.isdir(mine.path)
        assert (tmp_path / elsewhere).is_dir()
        assert all((tmp_path / name).is_dir() for name in foreign)
        assert sweep(str(tmp_path)) == []
    finally:
        alive.communicate("")
    assert sweep(str(tmp_path)) == [os.path.basename(living)]
    old = time.time() - 3 * hidden.QUIET_SECONDS
    os.utime(tmp_path / elsewhere, (old, old))
    assert sweep(str(tmp_path)) == [elsewhere]
    assert sweep(str(tmp_path / "absent")) == []


def test_a_zombie_is_dead(tmp_path):
    child = crash(tmp_path / "c")
    left = child.stdout.readline().strip()
    deadline = time.monotonic() + 20
    while process.start_time(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sweep(str(tmp_path)) == [os.path.basename(left)]  # it ended, and nobody has waited for it
    child.communicate()


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    replace_file(str(path), b"one")
    replace_file(str(path), b"two")
    assert path.read_bytes() == b"two"

    def fail(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(str(path), b"three")
    assert os.listdir(tmp_path) == ["checkpoint"]
    with pytest.raises(FileExistsError):
        write_file(str(path), b"x")


def test_discarding_what_is_gone_is_no_error(tmp_path):
    abandon(Staging(path=str(tmp_path / "gone"), target="x"))


# processes


def test_this_process_lives_and_a_later_one_of_its_number_is_another():
    me = process.current()
    assert process.is_alive(me) is True
    assert me == process.current()
    other = process.ProcessId(host=me.host, boot=me.boot, pid=me.pid, start="1")
    assert process.is_alive(other) is False


def test_a_process_elsewhere_cannot_be_told():
    me = process.current()
    assert process.is_alive(process.ProcessId(host="other", boot="b", pid=me.pid, start=me.start)) is None


def test_a_process_that_ended_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = process.current()
    there = process.ProcessId(
        host=me.host, boot=me.boot, pid=child.pid, start=process.start_time(child.pid) or ""
    )
    assert process.is_alive(there) is True
    child.communicate(b"\n")
    assert process.is_alive(there) is False
    nobody = process.ProcessId(host=me.host, boot=me.boot, pid=1 << 40, start="5")
    assert process.is_alive(nobody) in (None, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_another_process():
    me = process.current()
    code = "import os, sys; from jaxckpt.storage import process as p; a = p.current(); pid = os.fork(); b = p.current(); ok = (pid != 0) == (a == b) and p.is_alive(a); os._exit(not ok) if pid == 0 else sys.exit(not ok or os.waitpid(pid, 0)[1])"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert process.current() == me
