"""One writer for a directory: who it is, when it is dead, who takes over."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import pytest

from jaxckpt.errors import DirectoryInUseError
from jaxckpt.storage import heartbeat, lease, process
from jaxckpt.storage.heartbeat import DEAD_SECONDS, Renewer, Watch
from jaxckpt.storage.lease import Holder, Lease, decode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning"),
]

ELSEWHERE = process.ProcessId(host="elsewhere", boot="b", pid=1, start="1")


class Clock:
    """A clock that only sleeping moves; ``at`` calls a function when that time has come."""

    def __init__(self):
        self.now = 0.0
        self.events = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds
        for when, act in [event for event in self.events if event[0] <= self.now]:
            self.events.remove((when, act))
            act()


def write(directory, holder):
    folder = directory / lease.FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "lease").write_bytes(holder if isinstance(holder, bytes) else holder.encode())


def holder_of(directory):
    return decode((directory / lease.FOLDER / "lease").read_bytes())


def elsewhere(renewals=0):
    return Holder(process=ELSEWHERE, token="theirs", renewals=renewals)


def make(directory, clock=None):
    clock = clock or Clock()
    return Lease(str(directory), clock=clock, sleep=clock.sleep)


def test_making_one_writes_nothing(tmp_path):
    made = make(tmp_path)
    assert not made.held
    assert os.listdir(tmp_path) == []
    with pytest.raises(DirectoryInUseError, match="the lease is gone"):
        made.check()


def test_taken_checked_renewed_and_given_back(tmp_path):
    mine = make(tmp_path / "new" / "dir")
    assert mine.acquire()
    assert not mine.acquire()
    mine.check()
    holder = holder_of(tmp_path / "new" / "dir")
    assert holder.process == process.current()
    assert holder.renewals == 0
    mine.renew()
    assert holder_of(tmp_path / "new" / "dir") == replace(holder, renewals=1)
    assert mine.held
    document = json.loads((tmp_path / "new" / "dir" / lease.FOLDER / "lease").read_text())
    assert set(document["process"]) == {"host", "boot", "pid", "start"}
    mine.release()
    mine.release()
    assert not mine.held
    mine.renew()  # too late: it does not come back
    assert not (tmp_path / "new" / "dir" / lease.FOLDER / "lease").exists()
    assert mine.acquire()
    mine.release()


def test_a_live_process_is_named(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        owner = replace(process.current(), pid=child.pid, start=process.start_time(child.pid))
        write(tmp_path, Holder(process=owner, token="t"))
        mine = make(tmp_path)
        with pytest.raises(DirectoryInUseError, match=rf"process {child.pid} on {owner.host}"):
            mine.acquire()
        assert holder_of(tmp_path).token == "t"
    finally:
        child.communicate()
    assert mine.acquire()  # dead on this boot: free at once
    mine.release()


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path):
    owner = replace(process.current(), pid=os.getppid(), start="1")
    write(tmp_path, Holder(process=owner, token="t"))
    clock = Clock()
    assert make(tmp_path, clock).acquire()
    assert clock.now == 0


def test_a_dead_process_frees_it_though_its_forked_child_lives(tmp_path):
    code = """
        import os, sys, time, jaxckpt
        from jaxckpt.storage.lease import Lease
        Lease(sys.argv[1]).acquire()
        if os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
        os._exit(1)
        """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert child.wait(60) == 1
        mine = make(tmp_path)
        assert mine.acquire()
        mine.release()
    finally:
        child.stdin.close()


def test_silence_elsewhere_frees_it_after_a_while(tmp_path):
    write(tmp_path, elsewhere())
    clock = Clock()
    mine = make(tmp_path, clock)
    assert mine.acquire()
    assert DEAD_SECONDS <= clock.now < DEAD_SECONDS + 2
    mine.release()


def test_silence_counts_from_when_the_lease_was_first_seen(tmp_path):
    write(tmp_path, elsewhere())
    clock = Clock()
    mine = make(tmp_path, clock)
    clock.now = DEAD_SECONDS - 10
    assert mine.acquire()
    assert clock.now < DEAD_SECONDS + 2
    mine.release()


def test_a_renewal_elsewhere_shows_that_it_lives(tmp_path):
    write(tmp_path, elsewhere())
    clock = Clock()
    clock.events.append((30.0, lambda: write(tmp_path, elsewhere(1))))
    with pytest.raises(DirectoryInUseError, match="process 1 on elsewhere"):
        make(tmp_path, clock).acquire()
    assert clock.now < 32


def test_a_renewal_long_ago_shows_nothing(tmp_path):
    """It changed since it was first seen, hours ago; whether just now or just after, nobody saw."""
    write(tmp_path, elsewhere())
    clock = Clock()
    mine = make(tmp_path, clock)
    write(tmp_path, elsewhere(1))
    clock.now = 10_000.0
    assert mine.acquire()
    assert clock.now >= 10_000 + DEAD_SECONDS
    mine.release()


def test_given_back_while_somebody_waits(tmp_path):
    write(tmp_path, elsewhere())
    clock = Clock()
    clock.events.append((5.0, lambda: os.unlink(tmp_path / lease.FOLDER / "lease")))
    mine = make(tmp_path, clock)
    assert mine.acquire()
    assert clock.now < 7
    mine.release()


@pytest.mark.parametrize(
    "data", [b"{", b"\xff", b"[]", b'{"token": "x"}', b'{"process": 3, "token": "x", "renewals": 0}']
)
def test_what_cannot_be_read_counts_as_a_holder_elsewhere(tmp_path, data):
    write(tmp_path, data)
    clock = Clock()
    mine = make(tmp_path, clock)
    assert mine.acquire()
    assert clock.now >= DEAD_SECONDS
    mine.release()
    write(tmp_path, data)
    clock.events.append((clock.now + 5, lambda: write(tmp_path, data + b" ")))
    with pytest.raises(DirectoryInUseError):
        make(tmp_path, clock).acquire()


def test_the_newer_one_of_a_process_takes_over(tmp_path):
    drained = []
    clock = Clock()
    old = Lease(str(tmp_path), drain=lambda: drained.append(old.held), clock=clock, sleep=clock.sleep)
    new = make(tmp_path)
    old.acquire()
    new.acquire()
    assert drained == [True]  # what it had under way was committed with the lease still its own
    assert new.held
    with pytest.raises(DirectoryInUseError, match="has taken over"):
        old.check()
    with pytest.raises(DirectoryInUseError, match="newer CheckpointManager of this process"):
        old.acquire()
    new.release()
    assert old.acquire()  # nobody else writes any more
    old.release()


def test_one_that_was_thrown_away_is_in_nobodys_way(tmp_path):
    forgotten = make(tmp_path)
    forgotten.acquire()
    del forgotten
    gc.collect()
    mine = make(tmp_path)
    assert mine.acquire()
    mine.release()


def test_of_many_threads_one_gets_it(tmp_path):
    leases = [make(tmp_path) for _ in range(8)]
    refused = []

    def take(one):
        try:
            one.acquire()
        except DirectoryInUseError:
            refused.append(one)

    threads = [threading.Thread(target=take, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.held for one in leases].count(True) == 1
    assert leases[-1].held
    leases[-1].release()


RACE = """
    import sys, time
    from jaxckpt.errors import DirectoryInUseError
    from jaxckpt.storage.lease import Lease
    mine = Lease(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        mine.acquire()
        print("won", flush=True)
    except DirectoryInUseError:
        print("lost", flush=True)
    sys.stdin.readline()
    """


def test_of_many_processes_one_gets_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        assert [child.stdout.readline() for child in children] == ["ready\n"] * 4
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        assert sorted(child.stdout.readline() for child in children) == ["lost\n"] * 3 + ["won\n"]
    finally:
        for child in children:
            child.communicate("\n", timeout=60)
    assert not (tmp_path / lease.FOLDER / "lease").exists()  # given back at exit


def test_a_forked_child_neither_holds_nor_gives_back(tmp_path):
    mine = make(tmp_path)
    mine.acquire()
    pid = os.fork()
    if pid == 0:
        mine.release()
        try:
            make(tmp_path).acquire()
        except DirectoryInUseError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert mine.held
    mine.release()


def test_watch():
    clock = Clock()
    watch = Watch(clock)
    assert watch.look("a", 1) == (0.0, False)
    clock.now = 5.0
    assert watch.look("a", 1) == (5.0, False)
    clock.now = 9.0
    assert watch.look("a", 2) == (0.0, True)
    clock.now = 9.0 + DEAD_SECONDS + 1
    assert watch.look("a", 3) == (0.0, False)
    watch.forget({"b"})
    clock.now += 5
    assert watch.look("a", 3) == (0.0, False)


def test_the_renewer_renews_what_is_alive_and_ends(monkeypatch):
    monkeypatch.setattr(heartbeat, "RENEW_SECONDS", 0.005)
    renewer = Renewer()
    renewed = threading.Event()

    class Item:
        def renew(self):
            renewed.set()
            raise OSError("away for a moment")

    item = Item()
    renewer.add(item)
    thread = renewer._thread
    assert thread.daemon
    for _ in range(2):
        assert renewed.wait(10)
        renewed.clear()
    del item
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
