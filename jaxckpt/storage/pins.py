"""Pins: what retention must leave alone. One file each under ``.jaxckpt/pins``, so that none is ever lost
in a rewrite by somebody else.

``<name>.pin`` keeps the checkpoint of that name until it is unpinned. ``<name>.<token>.hold`` keeps it while
the process that is recorded in the file lives: an evaluation at work.

A pin holds from the moment `pin` returns, with no lock between the two processes: `pin` writes its file and
looks whether the checkpoint is there *after* that; `remove` hides the checkpoint first, and looks for pins
*after* that, so that one of the two sees the other.
"""  # noqa: D205

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING

from jaxckpt.errors import CheckpointNotFoundError
from jaxckpt.storage import directory as directories
from jaxckpt.storage import process
from jaxckpt.storage.heartbeat import DEAD_SECONDS, Watch, from_json, renewer, to_json
from jaxckpt.storage.hidden import remove_tree, temporary
from jaxckpt.storage.lease import FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable

_PIN = ".pin"
_HOLD = ".hold"


def pin(directory: str, name: str) -> None:
    """Keeps the checkpoint ``name`` until it is unpinned.

    Raises:
        CheckpointNotFoundError: it is not there (any more).
    """
    existed = name in pinned(directory)
    _write(_file(directory, name + _PIN), {"process": to_json(process.current()), "time": time.time()})
    if not _stays(directory, name):
        if not existed:
            unpin(directory, name)
        raise CheckpointNotFoundError(f"{os.path.join(directory, name)} is not there, so it cannot be pinned")


def unpin(directory: str, name: str) -> None:
    """Takes the pin away; nothing happens where there is none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_file(directory, name + _PIN))


def pinned(directory: str) -> set[str]:
    """Names of the checkpoints that are kept until they are unpinned."""
    return {file.removesuffix(_PIN) for file in _files(directory) if file.endswith(_PIN)}


class Hold:
    """Keeps a checkpoint while this process lives, until it is released.

    Raises:
        CheckpointNotFoundError: it is not there (any more).
        OSError: the directory cannot be written to.
    """

    def __init__(self, directory: str, name: str) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._renewals = 0
        self._path = _file(directory, f"{name}.{secrets.token_hex(8)}{_HOLD}")
        self.renew()
        if not _stays(directory, name):
            self.release()
            raise CheckpointNotFoundError(
                f"{os.path.join(directory, name)} is not there, so it cannot be held"
            )
        renewer.add(self)

    def renew(self) -> None:
        """Shows that the process lives; for the `heartbeat.renewer`."""
        with self._lock:
            if self._path:
                _write(self._path, {"process": to_json(process.current()), "renewals": self._renewals})
            self._renewals += 1

    def release(self) -> None:
        """Lets go; a forked child leaves what its parent holds."""
        if self._pid != os.getpid():
            return
        renewer.remove(self)
        with self._lock, contextlib.suppress(OSError):
            path, self._path = self._path, ""
            if path:
                os.unlink(path)


def held(directory: str, watch: Watch) -> set[str]:
    """Names of the checkpoints that a live process holds. Files of dead ones are removed.

    Args:
        directory: of checkpoints.
        watch: what this observer has seen so far of holders that live elsewhere.
    """
    names: set[str] = set()
    seen: set[str] = set()
    for file in _files(directory):
        if not file.endswith(_HOLD):
            continue
        path = _file(directory, file)
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            if _lives(path, watch):
                seen.add(path)
                names.add(file.removesuffix(_HOLD).rpartition(".")[0])
            else:
                os.unlink(path)
    watch.forget(seen)
    return names


def remove(directory: str, name: str, *, is_kept: Callable[[], bool]) -> bool:
    """Deletes a checkpoint unless it is kept. No reader ever sees a part of it: it is hidden first.

    Args:
        directory: of checkpoints.
        name: of the checkpoint.
        is_kept: looks for pins; called before it is hidden, and again after.

    Returns:
        Whether it is gone.

    Raises:
        OSError: the file system refuses; the checkpoint is still there, whole.
    """
    if is_kept():
        return False
    path = os.path.join(directory, name)
    hidden = temporary(path)
    os.rename(path, hidden)
    kept = True  # also when it cannot be told
    try:
        kept = is_kept()
    finally:
        if kept:
            os.rename(hidden, path)
    if not kept:
        remove_tree(hidden)
    return not kept


def _lives(path: str, watch: Watch) -> bool:
    with open(path, "rb") as file:
        data = file.read()
    try:
        alive = process.is_alive(from_json(json.loads(data)["process"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        alive = None  # of a release that is not known
    silent, _ = watch.look(path, data)
    return silent < DEAD_SECONDS if alive is None else alive


def _stays(directory: str, name: str) -> bool:
    # One that is hidden at this moment comes back at once when its remover has seen the pin.
    path = os.path.join(directory, name)
    for pause in (0.0, 0.01, 0.04):
        time.sleep(pause)
        if os.path.isdir(path):
            return True
    return False


def _files(directory: str) -> list[str]:
    try:
        names = os.listdir(os.path.join(directory, FOLDER, "pins"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in names if not name.startswith(".")]


def _file(directory: str, name: str) -> str:
    return os.path.join(directory, FOLDER, "pins", name)


def _write(path: str, fields: dict[str, object]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    directories.replace_file(path, json.dumps(fields, indent=1).encode())
