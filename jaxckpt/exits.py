"""What the end of the program waits for, and what it says: no exit loses a save, and none fails in silence.

The main thread's end is a row of events: functions of `threading` are called, threads that are no daemons are
joined, exit handlers run, standard streams are flushed, the process ends with its exit code. We wait in the
first, where a Ctrl-C can be answered (in the second it would end the joining, with a traceback), and again in
the third, for what threads have begun meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from jaxckpt.storage import directory

if TYPE_CHECKING:
    from jaxckpt.writer import SaveFuture, Writer

#: After how long an exit says what it waits for.
NOTICE_SECONDS = 5.0
_LOOK_SECONDS = 0.1


def guard(writer: Writer) -> None:
    """Makes every exit of this process wait for a writer's saves, and tell of those that failed.

    To be called at the first save: exit handlers run in the reverse order, and saves need what handlers of
    modules imported by then take away (the lease of a directory, JAX's devices).
    """
    # Private, there since Python 3.9, and what concurrent.futures waits by. Without it the threads are joined
    # all the same, as they are no daemons. It refuses (RuntimeError) when the end has begun already.
    register: Any = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):
            register(_main_ends, writer)
    atexit.register(_interpreter_ends, writer)
    if main_has_ended() and in_main_thread():
        writer.close()  # the first save is an exit handler's: what is registered now is not called any more


def main_has_ended() -> bool:
    """Whether the main thread has nothing more to do but to wait, and to call exit handlers."""
    return not threading.main_thread().is_alive()


def in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _main_ends(writer: Writer) -> None:
    _wait(writer, then=_run_exit_handlers)
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None and tell_of_failures(writer):
        # A forked child of multiprocessing runs no exit handlers; this leaves it with its code for a failure.
        raise SystemExit(1)


def _interpreter_ends(writer: Writer) -> None:
    writer.close()
    _wait(writer, then=lambda: None)
    directory.remove_left()
    tell_of_failures(writer)


def tell_of_failures(writer: Writer) -> bool:
    """Says which saves have failed without anybody looking, and makes the exit code say so, too."""
    failed = writer.unseen()
    if not failed:
        return False
    for future in failed:
        error = " ".join(str(future.exception()).split())  # from here on it counts as seen
        _say(f"saving {future.path} failed: {error}")
    _make_the_last_flush_fail()
    return True


def _make_the_last_flush_fail() -> None:
    """Makes the exit code 120: Python's own for "an error in the cleanup, such as flushing buffered data".

    An exit handler cannot set the code, and ending the process here would skip handlers and lose what other
    files have in their buffers. What fails is the flush of standard error after all that, which is silent.
    """
    if sys.stderr is None or sys.stderr.closed:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = SimpleNamespace(closed=False, write=len, flush=lambda: None)
    for stream in {id(stream): stream for stream in (sys.stderr, sys.__stderr__) if stream}.values():
        with contextlib.suppress(AttributeError):
            stream.flush = _failing_at_the_end(stream.flush)  # pyright: ignore[reportAttributeAccessIssue]


def _failing_at_the_end(flush: Callable[[], Any]) -> Callable[[], None]:
    def fail() -> None:
        flush()
        if sys.is_finalizing():
            raise OSError("a checkpoint was not saved")

    return fail


def _wait(writer: Writer, then: Callable[[], object]) -> None:
    """Returns when what is under way has ended; at a second Ctrl-C gives up, and the process with it."""
    saves = writer.under_way()
    if not saves:
        return
    names = _names(saves)
    since, asked, told = time.monotonic(), False, False
    with _interrupts() as interrupts:
        while not writer.wait(saves, _LOOK_SECONDS):
            if interrupts:
                interrupts.clear()  # one Ctrl-C can come twice, from the terminal and from a parent process
                if asked:
                    _give_up(names, then)
                _say(f"still waiting for {names}: a second Ctrl-C gives up")
                asked = told = True
            elif not told and time.monotonic() - since >= NOTICE_SECONDS:
                _say(f"waiting for {names} to be written; pressing Ctrl-C twice gives up")
                told = True


def _names(saves: Sequence[SaveFuture]) -> str:
    paths = [save.path for save in saves]
    return f"the checkpoint{'s' if len(paths) > 1 else ''} {', '.join(paths)}"


@contextlib.contextmanager
def _interrupts() -> Generator[list[int]]:
    """Collects what Ctrl-C sends, where that means something to this program."""
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    ours = False
    if callable(before):
        with contextlib.suppress(ValueError):  # not the main thread of the main interpreter
            signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))  # noqa: ARG005
            ours = True
    try:
        yield heard
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _give_up(names: str, then: Callable[[], object]) -> NoReturn:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third Ctrl-C ends the process at once
    swept = directory.give_up()
    _say(f"gave up {names}" + ("" if swept else ": what is left of it goes with the next save there"))
    then()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed: there is nobody left to tell
            stream.flush()
    os._exit(130)


def _run_exit_handlers() -> None:
    atexit.unregister(_interpreter_ends)
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]


def _say(line: str) -> None:
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is not None:  # a notebook's kernel: its terminal is nobody's
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error is closed, or None
        print(f"jaxckpt: {line}", file=sys.stderr, flush=True)
