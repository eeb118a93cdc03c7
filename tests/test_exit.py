"""Every way for a program to end: the checkpoint is durable, or the exit code is not 0 and one line says why.

The children are programs of their own. Most of them save nothing but a file, by the background writer itself,
which needs no jax: they start in a moment, and their saves can last as long as the test wants.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import jaxckpt

# `save(name)`: a save that ends when `gate` is set, and writes into its staging area until then.
LIGHT = """
import atexit, faulthandler, os, sys, threading, time
faulthandler.dump_traceback_later(40, exit=True)
from jaxckpt import exits
from jaxckpt.report import SaveReport
from jaxckpt.storage import directory
from jaxckpt.writer import writer
os.chdir(sys.argv[1])
gate = threading.Event()
exits.NOTICE_SECONDS = 60.0

def save(name, gate=gate, fail=None):
    def work():
        staging = directory.stage(name)
        try:
            while True:
                os.makedirs(os.path.join(staging.path, "d"), exist_ok=True)  # as storage does
                with open(os.path.join(staging.path, "d", "values"), "w") as file:
                    file.write(name)
                if gate.wait(0.002):
                    break
            if fail:
                raise OSError(fail)
            directory.commit(staging)
        except BaseException:
            directory.abandon(staging)
            raise
        return SaveReport(path=name)
    return writer.submit(name, 1, 1 << 30, lambda: (work, 1))

def later(seconds):  # lets the saves end, also when the main thread has left
    threading.Thread(target=lambda: (time.sleep(seconds), gate.set()), daemon=True).start()
"""


def start(tmp_path, code, setup=LIGHT):
    (tmp_path / "program.py").write_text(setup + textwrap.dedent(code))
    (tmp_path / "d").mkdir()
    paths = os.pathsep.join([os.path.dirname(os.path.dirname(jaxckpt.__file__)), *sys.path])
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "d")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )


class Ended:
    def __init__(self, tmp_path, child, out="", err=""):
        rest_out, rest_err = child.communicate(timeout=60)
        self.code, self.out, self.err = child.returncode, out + rest_out, err + rest_err
        self.lines = [line for line in self.err.splitlines() if line.startswith("jaxckpt:")]
        self.there = sorted(os.listdir(tmp_path / "d"))


def run(tmp_path, code, setup=LIGHT):
    return Ended(tmp_path, start(tmp_path, code, setup))


ENDS = {
    "leaving main": ("", 0),
    "sys.exit": ("sys.exit(0)", 0),
    "sys.exit with a code": ("sys.exit(3)", 3),
    "an uncaught exception": ("raise RuntimeError('training failed')", 1),
    "sys.exit in another thread": (
        "thread = threading.Thread(target=lambda: sys.exit(5)); thread.start(); thread.join()",
        0,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_exit_waits_for_the_save_and_for_the_one_behind_it(tmp_path, end):
    statement, code = ENDS[end]
    ended = run(tmp_path, "save('a'); save('b'); later(0.3)\n" + statement)
    assert (ended.code, ended.there, ended.lines) == (code, ["a", "b"], [])
    assert ("training failed" in ended.err) == ("exception" in end)
    if "exception" not in end:
        assert ended.err == ""


def test_a_real_program_with_managers(tmp_path):
    """One process for many: the last exit of all is the uncaught exception inside `with`."""
    ended = run(
        tmp_path,
        """
        import os, sys, threading
        import jax.numpy as jnp, numpy as np, jaxckpt
        os.chdir(sys.argv[1])
        def last():
            manager.save({"w": jnp.ones(3)}, step=7)
        import atexit
        atexit.register(last)  # before the first save
        manager = jaxckpt.CheckpointManager("m")
        jaxckpt.save_async("a", {"w": jnp.ones((512, 1024)), "h": np.arange(10.)})
        def outlives_main():
            threading.main_thread().join()
            manager.save({"w": jnp.zeros(3)}, step=6)
        threading.Thread(target=outlives_main).start()
        with jaxckpt.CheckpointManager("n") as other:
            other.save({"w": jnp.ones(3)}, step=1)
            raise RuntimeError("training failed")
        """,
        setup="",
    )
    assert (ended.code, ended.lines) == (1, []), ended.err
    assert ended.err.count("Traceback") == 1
    assert ended.there == ["a", "m", "n"]
    reader = jaxckpt.load_checkpoint(tmp_path / "d" / "a")
    assert (reader["w"] == 1).all()
    assert reader["w"].shape == (512, 1024)
    assert jaxckpt.CheckpointManager(tmp_path / "d" / "m").steps == [6, 7]
    assert (jaxckpt.load_checkpoint(tmp_path / "d" / "m" / "ckpt-7")["w"] == 1).all()
    assert jaxckpt.CheckpointManager(tmp_path / "d" / "n").steps == [1]


# failures


def test_a_failure_that_nobody_saw_ends_in_a_non_zero_exit_and_one_line(tmp_path):
    ended = run(
        tmp_path,
        """
        atexit.register(lambda: print("an early handler"))
        gate.set()
        save("a", fail="the disk\\nis gone")
        atexit.register(lambda: print("a late handler"))
        kept = open("kept", "w"); kept.write("what the program has written")  # and neither flushed nor closed
        """,
    )
    assert (ended.code, ended.lines) == (120, ["jaxckpt: saving a failed: the disk is gone"])
    assert ended.err.count("\n") == 1
    assert ended.out == "a late handler\nan early handler\n"
    assert ended.there == ["kept"]
    assert (tmp_path / "d" / "kept").read_text() == "what the program has written"


HIDERS = {
    "a code of the program's": "sys.exit(3)",
    "an uncaught exception": "raise RuntimeError('training failed')",
    "standard error is closed": "sys.stderr.close()",
    "there is none": "sys.stderr = None",
    "it is no file": "import io; sys.stderr = io.StringIO()",
    "it is put back by a handler that runs after ours": "sys.stderr = open(os.devnull, 'w')",
}


@pytest.mark.parametrize("how", HIDERS)
def test_nothing_hides_a_failure(tmp_path, how):
    back = "atexit.register(lambda: setattr(sys, 'stderr', sys.__stderr__))\n" if "put back" in how else ""
    ended = run(tmp_path, back + "save('a', fail='x')\ngate.set()\n" + HIDERS[how])
    assert (ended.code, ended.there) == (120, [])


def test_a_failure_that_was_seen_does_not_change_the_exit_code(tmp_path):
    ended = run(
        tmp_path,
        """
        gate.set()
        assert isinstance(save("a", fail="x").exception(), OSError)
        late = save("b", fail="y")
        atexit.register(lambda: late.exception())
        """,
    )
    assert (ended.code, ended.err, ended.there) == (0, "", [])


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_of_multiprocessing_waits_and_tells(tmp_path, method):
    ended = run(
        tmp_path,
        f"""
        import multiprocessing
        def good(): save("a"); later(0.2)
        def bad(): gate.set(); save("b", fail="x")
        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            for work in (good, bad):
                child = context.Process(target=work)
                child.start()
                child.join()
                print(child.exitcode, flush=True)
        """,
    )
    good, bad = ended.out.split()
    assert good == "0"
    assert bad in ("1", "120")
    assert ended.lines == ["jaxckpt: saving b failed: x"]
    assert "Traceback" not in ended.err
    assert ended.there == ["a"]


# odd ends


def test_a_daemon_thread_that_saves_for_ever_does_not_keep_the_program(tmp_path):
    ended = run(
        tmp_path,
        """
        gate.set()
        def forever():
            for number in range(10 ** 9):
                save(f"c{number}").result()
                with open("told", "w") as file: file.write(str(number))
        threading.Thread(target=forever, daemon=True).start()
        while not os.path.exists("told"): time.sleep(0.01)
        """,
    )
    assert (ended.code, ended.err) == (0, "")
    told = int((tmp_path / "d" / "told").read_text() or 0)
    assert {f"c{number}" for number in range(told)} <= set(ended.there)
    assert not any(name.startswith(".") for name in ended.there)


def test_an_exit_handler_may_save_and_may_wait_for_a_daemon_thread_that_does(tmp_path):
    ended = run(
        tmp_path,
        """
        import queue
        todo = queue.Queue()
        def work():
            while True:
                name = todo.get()
                save(name)
                todo.task_done()
        atexit.register(lambda: save("early"))  # called after ours
        save("first"); gate.set()
        atexit.register(lambda: save("late"))
        atexit.register(lambda: (todo.put("queued"), todo.join()))
        threading.Thread(target=work, daemon=True).start()
        """,
    )
    assert (ended.code, ended.err, ended.there) == (0, "", ["early", "first", "late", "queued"])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fail", [True, False])
def test_the_last_exit_handler_of_all(tmp_path, first, fail):
    """Ours has been called by then, or it is too late to have one."""
    ended = run(
        tmp_path,
        f"""
        gate.set()
        atexit.register(lambda: save("last", fail={"x" if fail else ""!r}))
        if {not first}: save("before")
        """,
    )
    assert ended.there == ([] if first else ["before"]) + ([] if fail else ["last"])
    assert ended.code == (120 if fail else 0)
    assert ended.err == ("jaxckpt: saving last failed: x\n" if fail else "")


def test_threads_that_outlive_the_main_one(tmp_path):
    ended = run(
        tmp_path,
        """
        def work():
            threading.main_thread().join()
            for name in "abc":
                save(name)
        threading.Thread(target=work).start()
        later(0.3)
        """,
    )
    assert (ended.code, ended.err, ended.there) == (0, "", ["a", "b", "c"])


# waiting, and Ctrl-C


def wait_for(child, text):
    """What the child says on standard error up to a line with this text."""
    said = ""
    for line in child.stderr:
        said += line
        if text in line:
            return said
    pytest.fail(f"not said: {text}. But: {said}")


def interrupt(child):
    time.sleep(0.3)  # more than one comes from several senders
    child.send_signal(signal.SIGINT)


def test_a_long_wait_is_told_of_once(tmp_path):
    ended = run(tmp_path, "exits.NOTICE_SECONDS = 0.1; save('a'); save('b'); later(1)")
    line = "jaxckpt: waiting for the checkpoints a, b to be written; pressing Ctrl-C twice gives up"
    assert (ended.code, ended.err, ended.there) == (0, line + "\n", ["a", "b"])


def test_a_short_wait_is_not_told_of(tmp_path):
    assert run(tmp_path, "assert exits.NOTICE_SECONDS >= 5; save('a'); later(0.5)").err == ""


def test_notebooks_are_told_nothing(tmp_path):
    ended = run(
        tmp_path,
        """
        import types
        sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
        exits.NOTICE_SECONDS = 0.1
        save("a"); save("b", fail="x"); later(0.5)
        """,
    )
    assert (ended.err, ended.there) == ("", ["a"])


def test_the_first_interrupt_asks_and_the_save_goes_on(tmp_path):
    child = start(
        tmp_path,
        "exits.NOTICE_SECONDS = 0.1; save('a'); threading.Thread(target=watch, daemon=True).start()",
        LIGHT + "def watch():\n    while not os.path.exists('go'): time.sleep(0.01)\n    gate.set()\n",
    )
    said = wait_for(child, "waiting for the checkpoint a")
    interrupt(child)
    said += wait_for(child, "still waiting for the checkpoint a: a second Ctrl-C gives up")
    (tmp_path / "d" / "go").touch()
    ended = Ended(tmp_path, child, err=said)
    assert (ended.code, ended.there, len(ended.lines)) == (0, ["a", "go"], 2)
    assert ended.err.count("\n") == 2


HANDLERS = {
    "Python's own": "",
    "the program's own": "import signal; signal.signal(signal.SIGINT, lambda *_: os._exit(99))",
}


@pytest.mark.parametrize("handler", HANDLERS)
def test_the_second_interrupt_gives_up_and_sweeps(tmp_path, handler):
    code = "\natexit.register(print, 'a handler')\nexits.NOTICE_SECONDS = 0.1; save('a'); save('b')"
    child = start(tmp_path, HANDLERS[handler] + code)
    said = wait_for(child, "waiting for the checkpoints a, b")
    assert any(name.startswith(".a.") for name in os.listdir(tmp_path / "d"))
    interrupt(child)
    said += wait_for(child, "still waiting")
    interrupt(child)
    ended = Ended(tmp_path, child, err=said)
    assert (ended.code, ended.there, ended.out) == (130, [], "a handler\n")
    assert ended.lines[2:] == ["jaxckpt: gave up the checkpoints a, b"]
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 3


def test_a_save_that_hears_nothing_is_given_up_too(tmp_path):
    """Its thread hangs (a disk that does not answer): what it has written is removed all the same."""
    child = start(
        tmp_path,
        """
        staging = directory.stage("a")
        open(os.path.join(staging.path, "x"), "w").close()
        writer.submit("a", 1, 1 << 30, lambda: (lambda: time.sleep(100), 1))
        exits.NOTICE_SECONDS, directory._GIVE_UP_SECONDS = 0.1, 0.2
        """,
    )
    said = wait_for(child, "waiting")
    interrupt(child)
    said += wait_for(child, "still waiting")
    interrupt(child)
    ended = Ended(tmp_path, child, err=said)
    assert (ended.code, ended.there) == (130, [])


def test_an_interrupt_of_the_programs_own_wait_is_the_programs(tmp_path):
    child = start(
        tmp_path,
        """
        future = save("a")
        print("waiting", file=sys.stderr, flush=True)
        try:
            future.result()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            later(0.3)
            sys.exit(4)
        """,
    )
    said = wait_for(child, "waiting")
    interrupt(child)
    ended = Ended(tmp_path, child, err=said)
    assert (ended.code, ended.err, ended.there) == (4, "waiting\ninterrupted\n", ["a"])


def test_an_interrupt_that_ends_the_program_is_not_the_first_of_the_wait(tmp_path):
    child = start(tmp_path, "save('a'); print('go', file=sys.stderr, flush=True); later(2); time.sleep(100)")
    said = wait_for(child, "go")
    interrupt(child)
    ended = Ended(tmp_path, child, err=said)
    assert ended.there == ["a"]
    assert ended.code in (-signal.SIGINT, 130)
    assert ended.lines == []


def test_an_interrupted_call_leaves_no_save_that_nobody_makes(tmp_path):
    """Ctrl-C while the call waits for room: the exit does not wait for what never began."""
    child = start(
        tmp_path,
        """
        save("a"); save("b")
        print("waiting", file=sys.stderr, flush=True)
        try:
            save("c")
        except KeyboardInterrupt:
            gate.set()
            save("d")
        """,
    )
    said = wait_for(child, "waiting")
    interrupt(child)
    ended = Ended(tmp_path, child, err=said)
    assert (ended.code, ended.there) == (0, ["a", "b", "d"])
