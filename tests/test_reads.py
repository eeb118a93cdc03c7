"""Reading ahead, and on several threads."""

import os
import threading

import numpy as np
import pytest

from jaxckpt.storage import reads
from jaxckpt.storage.reads import Part, Run, ahead, runs, work


class Job:
    def __init__(self, number, nbytes=4 << 20):
        self.number, self.nbytes = number, nbytes


def test_neighbours_are_read_in_one_call(tmp_path):
    data = np.random.default_rng(0).bytes(20_000)
    (tmp_path / "f").write_bytes(data)
    places = [(0, 10), (10, 5), (20, 7), (9000, 3), (9003, 0), (19_990, 10)]
    found = list(runs([Part(0, offset, length, i, i) for i, (offset, length) in enumerate(places)]))
    assert [(run.offset, run.length, run.nbytes, len(run.parts)) for run in found] == [
        (0, 27, 22, 3),
        (9000, 3, 3, 2),
        (19_990, 10, 10, 1),
    ]
    handle = os.open(tmp_path / "f", os.O_RDONLY)
    for run in found:
        buffers = [bytearray(part.length) for part in run.parts]
        assert run.read(handle, buffers)
        for part, buffer in zip(run.parts, buffers, strict=True):
            assert buffer == data[part.offset : part.offset + part.length]
    assert not Run(0, 19_000, 2000, 2000, [Part(0, 19_000, 2000, 0, 0)]).read(handle, [bytearray(2000)])
    os.close(handle)


def test_runs_end_at_a_file_a_size_and_a_number():
    assert len(list(runs([Part(0, 0, 9, 0, 0), Part(1, 9, 9, 1, 1)]))) == 2
    assert len(list(runs([Part(0, i * 10, 10, i, i) for i in range(1200)]))) == 3
    assert len(list(runs([Part(0, i << 20, 1 << 20, i, i) for i in range(9)]))) == 3
    assert list(runs([])) == []


@pytest.mark.parametrize("count", [1, 7])
def test_all_is_done_and_told_of_by_one_at_a_time(count):
    told, inside, threads = [], [], set()

    def do(job):
        threads.add(threading.get_ident())

    def done(nbytes):
        inside.append(1)
        assert len(inside) == 1
        told.append(nbytes)
        inside.pop()

    jobs = [Job(number, (4 << 20) + number) for number in range(count)]
    work(jobs, do, done)
    assert sorted(told) == [job.nbytes for job in jobs]


@pytest.mark.parametrize("where", ["do", "done"])
def test_the_first_failure_ends_it(where):
    begun = []

    def do(job):
        begun.append(job.number)
        if where == "do" and job.number == 2:
            raise OSError("no")

    def done(nbytes):
        if where == "done":
            raise OSError("no")

    before = threading.active_count()
    with pytest.raises(OSError, match="no"):
        work([Job(number) for number in range(1000)], do, done)
    assert len(begun) < 1000
    assert threading.active_count() == before


def test_an_interrupt_waits_for_what_was_begun(monkeypatch):
    begun, ended = threading.Event(), threading.Event()
    first = iter([True])

    def do(job):
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(5)
            return
        begun.set()
        assert not ended.wait(0.3)
        ended.set()

    real = threading.Thread.join

    def join(thread, timeout=None):
        if next(first, False):
            raise KeyboardInterrupt
        real(thread, timeout)

    monkeypatch.setattr(reads, "cores", lambda: 2)
    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        work([Job(0), Job(1)], do, lambda _: None)
    assert ended.is_set()


def test_the_next_is_made_while_one_is_in_use():
    made, using = [], threading.Event()

    def make(number):
        if number == 1:
            assert using.wait(5)  # comes only while 0 is in use
        made.append(number)
        return number

    got = []
    for number in ahead([lambda n=n: make(n) for n in range(4)]):
        using.set()
        got.append(number)
    assert got == made == [0, 1, 2, 3]
    assert list(ahead([])) == []


def test_a_failure_ahead_comes_in_its_turn():
    def fail():
        raise OSError("no")

    results = ahead([lambda: 0, fail, lambda: 2])
    assert next(results) == 0
    with pytest.raises(OSError, match="no"):
        next(results)


def test_giving_up_waits_for_what_was_begun():
    ended = threading.Event()
    results = ahead([lambda: 0, ended.set, lambda: 2])
    next(results)
    results.close()
    assert ended.is_set()


def test_without_threads_all_is_done_in_turn(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(reads.threading.Thread, "start", refuse)
    assert list(ahead([lambda: 0, lambda: 1])) == [0, 1]
    done = []
    work([Job(number) for number in range(9)], lambda job: done.append(job.number), lambda _: None)
    assert done == list(range(9))
