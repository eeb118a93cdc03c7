"""The lease of a directory: one writer at a time, and who it is.

The lease is a file, ``.jaxckpt/lease`` (JSON). Who wants it looks whether its holder lives: a process on
this boot of this host by its id and start time; one elsewhere by whether the file changes, measured by the
clock of the observer alone. The file is read and replaced under a lock (``.jaxckpt/lock``) where the file
system has locks; where it has none, the token that is read again at every commit decides.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import threading
import time
import weakref
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from jaxckpt.errors import DirectoryInUseError
from jaxckpt.storage import process
from jaxckpt.storage.heartbeat import DEAD_SECONDS, Watch, from_json, renewer, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from jaxckpt.storage.process import ProcessId

#: Folder of a directory of checkpoints for what is no checkpoint.
FOLDER = ".jaxckpt"
#: How long to wait for another process that looks at the lease; it holds the lock for some milliseconds.
LOCK_SECONDS = 5.0

_in_process = threading.RLock()
_ranks = itertools.count(1)
#: The leases of this process, by token.
_ours: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease.

    Attributes:
        process: which one.
        token: a random name for this holding.
        renewals: how often it was renewed.
    """

    process: ProcessId
    token: str
    renewals: int = 0

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "process": to_json(self.process)}, indent=1).encode()

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host}"


def decode(data: bytes) -> Holder | None:
    """The holder, or None where the bytes say none (torn, or from a release that is not known)."""
    try:
        fields = json.loads(data)
        return Holder(
            process=from_json(fields["process"]), token=str(fields["token"]), renewals=int(fields["renewals"])
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class Lease:
    """The lease of one directory, as one manager sees it.

    Of several in one process the one that was made last takes over from the others.

    Args:
        directory: of checkpoints; it is made when the lease is first taken.
        drain: called in the process itself when a newer lease is about to take over: returns when no save
            is under way any more.
        clock: seconds, never going back.
        sleep: how to wait.
    """

    def __init__(
        self,
        directory: str,
        *,
        drain: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.directory = directory
        self.path = os.path.join(directory, FOLDER, "lease")
        self.rank = next(_ranks)
        self._token = ""
        self._pid = os.getpid()
        self._drain = drain
        self._watch = Watch(clock)
        self._sleep = sleep
        self._drained = ""
        data = _read(self.path)  # the watching of a holder elsewhere begins now, long before the first save
        if data:
            self._watch.look(self.path, data)

    @property
    def held(self) -> bool:
        """Whether it is held now, by what the file says."""
        holder = decode(_read(self.path) or b"")
        return bool(self._token) and holder is not None and holder.token == self._token

    def acquire(self) -> bool:
        """Takes the lease, or finds that it is held already. Waits while it cannot tell whether the holder
        elsewhere is alive: until a renewal is seen, `DEAD_SECONDS` at the most.

        Returns:
            Whether it is new.

        Raises:
            DirectoryInUseError: another live process, or a newer manager of this one, holds it.
        """  # noqa: D205
        if self.held:
            return False
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        while True:
            with _exclusive(os.path.dirname(self.path)):
                data = _read(self.path) or b""
                pause = self._obstacle(data) if data else 0.0
                if not pause:
                    self._take()
                    return True
            self._make_way(data, pause)

    def check(self) -> None:
        """Raises `DirectoryInUseError` unless the lease is held: read again before each commit."""
        if self.held:
            return
        holder = decode(_read(self.path) or b"")
        who = f"{holder} has taken over" if holder else "the lease is gone"
        raise DirectoryInUseError(
            f"{self.directory} is no longer written by this manager: {who}; nothing was committed. "
            "Stop one of the two, or give this one another directory"
        )

    def release(self) -> None:
        """Gives the lease back, so that a process elsewhere need not wait for silence."""
        if not self._token or self._pid != os.getpid():
            return
        renewer.remove(self)
        with contextlib.suppress(OSError), _exclusive(os.path.dirname(self.path)):
            if self.held:
                os.unlink(self.path)
        self._token = ""

    def renew(self) -> None:
        """Shows that the holder lives; for the `heartbeat.renewer`."""
        with _exclusive(os.path.dirname(self.path)):
            holder = decode(_read(self.path) or b"")
            if holder is not None and holder.token == self._token:
                _write(self.path, replace(holder, renewals=holder.renewals + 1))

    def _take(self) -> None:
        self._token = secrets.token_hex(16)
        self._pid = os.getpid()
        _write(self.path, Holder(process=process.current(), token=self._token))
        _ours[self._token] = self
        renewer.add(self)

    def _obstacle(self, data: bytes) -> float:
        """Seconds after which to look again, or 0 when the lease is free."""
        holder = decode(data)
        if holder is not None and holder.process == process.current():
            other = _ours.get(holder.token)
            if other is None:
                return 0.0
            if other.rank > self.rank:
                raise DirectoryInUseError(
                    f"a newer CheckpointManager of this process writes to {self.directory} (a cell that ran "
                    "twice?): use that one, or close() it"
                )
            return 0.0 if self._drained == holder.token else 0.01
        alive = process.is_alive(holder.process) if holder is not None else None
        if alive is False:
            return 0.0
        silent, renewed = self._watch.look(self.path, data)
        if alive or renewed:
            raise DirectoryInUseError(
                f"{self.directory} is written to by {holder or 'a process of another release'}. "
                "Wait for its end or stop it, or give this run another directory"
            )
        return min(1.0, max(0.0, DEAD_SECONDS - silent))

    def _make_way(self, data: bytes, pause: float) -> None:
        holder = decode(data)
        other = _ours.get(holder.token) if holder is not None else None
        if holder is None or other is None:
            self._sleep(pause)
            return
        other._drain()  # what was handed to the older manager is committed before it loses the lease
        self._drained = holder.token


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: str, holder: Holder) -> None:
    temporary = f"{path}.{holder.token}"
    with open(temporary, "wb") as file:
        file.write(holder.encode())
    os.replace(temporary, path)


@contextlib.contextmanager
def _exclusive(folder: str) -> Generator[None]:
    """Excludes other threads and, where the file system has locks, other processes."""
    with _in_process:
        lock = -1
        try:
            lock = _lock(os.path.join(folder, "lock"))
            yield
        finally:
            if lock >= 0:
                os.close(lock)


def _lock(path: str) -> int:
    # A lock of fcntl belongs to the process: children that it forks do not keep it when it dies.
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < until:
                time.sleep(0.005)
                continue
        except OSError:
            pass  # a file system without locks
        return lock


def _release_all() -> None:
    for lease in list(_ours.values()):
        lease.release()


def _after_fork() -> None:
    global _in_process
    _in_process = threading.RLock()  # another thread of the parent may have held it
    _ours.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
# By then no save is under way: their threads are no daemons, and the interpreter joins them first.
atexit.register(_release_all)
