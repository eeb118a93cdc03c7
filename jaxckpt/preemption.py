"""Whether this process is about to be taken away: SIGTERM has come, or JAX's own notice of it.

The handler only takes note. What it notes is of the process, not of one manager, and is never forgotten.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import weakref
from typing import Any

#: The address of what the system calls for a signal; Python's own function is one for all of them.
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_int)(("PyOS_getsig", ctypes.pythonapi))


class Preemption:
    """The notice of one process, for all who ask.

    From the first question on SIGTERM does not end the process, until the last one who asks has left. The
    handler that was there before is called, too.

    Attributes:
        told: whether `ask` has ever answered true.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begins anew; a forked child has not been told anything."""
        self.told = False
        self._came = False
        self._askers = weakref.WeakSet[Any]()
        self._pid = os.getpid()
        self._earlier: list[Any] = []  # handlers that ours has replaced, the newest last
        self._depth = 0
        self._installed = 0
        self._step, self._steps = -1, 0

    def ask(self, asker: object, step: int) -> bool:
        """Whether the notice has come.

        Args:
            asker: counts as one who asks until it leaves, or is collected.
            step: of the training. Several processes all ask for the same steps in the same order.

        Raises:
            RuntimeError: the notice cannot be heard, so that false would mean nothing.
        """
        self._askers.add(asker)
        notice = self._ask_jax(step)
        if notice is None:
            self._listen()
            notice = self._came
        self.told = self.told or notice
        return self.told

    def leave(self, asker: object) -> None:
        """Gives the signal back to whom it belonged when nobody asks any more."""
        self._askers.discard(asker)
        # From another thread it cannot be given back: the handler does, if it is ever called.
        if not self._askers and threading.current_thread() is threading.main_thread():
            self._give_back()

    def leave_child(self) -> None:
        """For a forked child: SIGTERM is its own matter."""
        with contextlib.suppress(ValueError):  # of a subinterpreter
            self._give_back()
        self.forget()

    def _listen(self) -> None:
        """Makes our handler the one that is called, also where another has replaced it since."""
        if self._listens():
            return
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "a handler of signals can be installed by the main thread only: call preempted() there once "
                "before it is called in another thread"
            )
        earlier = signal.getsignal(signal.SIGTERM)
        if earlier != self._handle:
            self._earlier = [handler for handler in self._earlier if handler != earlier] + [earlier]
        signal.signal(signal.SIGTERM, self._handle)
        self._installed = _address(signal.SIGTERM)

    def _listens(self) -> bool:
        if signal.getsignal(signal.SIGTERM) != self._handle:
            return False
        return _address(signal.SIGTERM) == self._installed  # C code does not tell Python what it replaces

    def _give_back(self) -> bool:
        """Returns whether the signal was ours."""
        if not self._listens():
            return False
        earlier = self._earlier.pop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)
        return True

    def _handle(self, number: int, frame: Any) -> None:
        asked = bool(self._askers) and os.getpid() == self._pid  # not in a child, just forked
        if not asked and self._give_back():
            signal.raise_signal(number)
            return
        self._came = self._came or asked
        # One that had replaced ours may call it, as we call the one that was before us.
        earlier = self._earlier[-1 - self._depth] if self._depth < len(self._earlier) else None
        if callable(earlier):
            self._depth += 1
            try:
                earlier(number, frame)
            finally:
                self._depth -= 1

    def _ask_jax(self, step: int) -> bool | None:
        """What JAX's preemption service says. It listens to SIGTERM itself, within a second or so, and lets
        all processes know the same step. None where it is not on.
        """  # noqa: D205
        distributed = getattr(sys.modules.get("jax"), "distributed", None)
        if distributed is None or not distributed.is_initialized():
            return None
        import jax
        from jax.experimental import multihost_utils

        if step != self._step:
            # The step to stop at is the highest one that was asked for, plus one: a loop in strides would
            # miss it. So steps are counted.
            self._step, self._steps = step, self._steps + 1
        try:
            notice = multihost_utils.reached_preemption_sync_point(self._steps)
        except RuntimeError as error:
            if jax.process_count() == 1:
                return None
            raise RuntimeError(
                "with several processes preempted() needs JAX's preemption service, so that all stop at the "
                "same step; it is off: set jax_enable_preemption_service before jax.distributed.initialize()"
            ) from error
        if callable(signal.getsignal(signal.SIGTERM)) and _address(signal.SIGTERM) == _address(signal.SIGINT):
            raise RuntimeError(
                "JAX's preemption service hears nothing, since a handler of SIGTERM was installed after "
                "jax.distributed.initialize(): install it before"
            )
        return bool(notice)


notice = Preemption()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=notice.leave_child)
