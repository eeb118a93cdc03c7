"""Names of what is not yet, or no more, a checkpoint, and the removal of what dead processes have left.

Such a name says which process made it, so that nothing of a live one is ever swept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil

from jaxckpt.storage import process
from jaxckpt.storage.process import ProcessId

#: In the name of everything that this library has half done.
MARK = "jaxckpt-tmp"
# .<name>.jaxckpt-tmp-<host>-<token of the boot>-<pid>-<start>-<random>
_NAME = re.compile(
    rf"\..*\.{MARK}-(?P<host>[\w.]*)-(?P<boot>[0-9a-f]{{16}})-(?P<pid>\d{{1,10}})-(?P<start>[\d.]*)-[0-9a-f]{{12}}"
)
#: After how long without any change a leftover is swept whose process cannot be looked at (another host).
QUIET_SECONDS = 24 * 3600.0


def is_hidden(name: str) -> bool:
    """Whether a name is never that of a checkpoint."""
    return name.startswith(".")


def temporary(path: str) -> str:
    """A hidden path beside `path` that names this process; at most 255 bytes long."""
    parent, name = os.path.split(path)
    owner = process.current()
    host = re.sub(r"[^0-9A-Za-z.]", "_", owner.host)[:40]
    tail = f".{MARK}-{host}-{_boot_token(owner)}-{owner.pid}-{owner.start}-{secrets.token_hex(6)}"
    room = 254 - len(tail)
    stem = os.fsencode(name)[:room].decode("utf-8", "ignore")
    return os.path.join(parent, f".{stem}{tail}")


def sweep(directory: str, *, quiet_seconds: float = QUIET_SECONDS) -> list[str]:
    """Removes what dead processes have left in a directory, and nothing else.

    A leftover whose process lives is never touched. Where that cannot be told (another host, another boot) it
    goes when nothing in it has changed for `quiet_seconds`, by the file system's own clock.

    Returns:
        The names removed.
    """
    removed: list[str] = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return removed
    found = [(name, match) for name in names if (match := _NAME.fullmatch(name))]
    now = _clock(directory) if found else 0.0
    for name, match in found:
        path = os.path.join(directory, name)
        alive = _owner_alive(match)
        if alive is False or (alive is None and now - _last_change(path) > quiet_seconds):
            remove_tree(path)
            if not os.path.lexists(path):
                removed.append(name)
    return removed


def remove_tree(path: str) -> None:
    """Removes a file, or a directory with all that is in it, as far as it can be removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _boot_token(owner: ProcessId) -> str:
    return hashlib.blake2b(owner.boot.encode(), digest_size=8).hexdigest()


def _owner_alive(match: re.Match[str]) -> bool | None:
    here = process.current()
    if match["boot"] != _boot_token(here):
        return None
    owner = ProcessId(host=here.host, boot=here.boot, pid=int(match["pid"]), start=match["start"])
    return process.is_alive(owner)


def _clock(directory: str) -> float:
    """The time by the clock of the file system, which on a network is not ours."""
    path = temporary(os.path.join(directory, "clock"))
    try:
        os.mkdir(path)
        now = os.stat(path).st_mtime
        os.rmdir(path)
    except OSError:
        return 0.0  # then nothing is old
    return now


def _last_change(path: str) -> float:
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = os.lstat(path).st_mtime
        for parent, directories, files in os.walk(path):
            for name in (*directories, *files):
                newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)
    return newest
