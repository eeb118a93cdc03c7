"""Staging, committing and sweeping directories: the only place where checkpoints appear and disappear.

A checkpoint is written into a hidden directory beside its path and becomes visible by one rename. The name of
that directory says which process made it, so that only leftovers of dead ones are ever swept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from functools import cache
from typing import TYPE_CHECKING

from msgspec import Struct

from jaxckpt.errors import CheckpointExistsError, SaveError, UnsupportedFormatError
from jaxckpt.storage import process
from jaxckpt.storage.exchange import exchange, rename_new
from jaxckpt.storage.process import ProcessId

if TYPE_CHECKING:
    from collections.abc import Generator

_MARK = "jaxckpt-tmp"
# .<name>.jaxckpt-tmp-<host>-<token of the boot>-<pid>-<start>-<random>
_NAME = re.compile(
    rf"\..*\.{_MARK}-(?P<host>[\w.]*)-(?P<boot>[0-9a-f]{{16}})-(?P<pid>\d{{1,10}})-(?P<start>[\d.]*)-[0-9a-f]{{12}}"
)
#: After how long without any change a leftover is swept whose process cannot be looked at (another host).
QUIET_SECONDS = 24 * 3600.0
# One of these is in every checkpoint that `overwrite` may replace.
_SIGNS = ("graph.json", "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "commit_success.txt")


class Staging(Struct, frozen=True, kw_only=True):
    """A checkpoint on its way.

    Attributes:
        path: the hidden directory that is written to.
        target: where it will be.
    """

    path: str
    target: str


@contextlib.contextmanager
def saving(path: str) -> Generator[None]:
    """Turns what the operating system refuses into a `SaveError` that names the path and the cause."""
    try:
        yield
    except (SaveError, CheckpointExistsError):
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != path else ""
        remedy = _REMEDIES.get(error.errno or 0, "")
        failure = SaveError(f"{path} could not be written: {error.strerror or error}{where}{remedy}")
        failure.errno = error.errno
        raise failure from error


_REMEDIES = {
    errno.ENOSPC: ". Free some space, or keep fewer checkpoints (`max_to_keep`)",
    errno.EDQUOT: ". Free some of your quota, or keep fewer checkpoints (`max_to_keep`)",
    errno.EACCES: ". Choose a directory that you may write to",
    errno.EROFS: ". Choose a directory that you may write to",
}


def is_hidden(name: str) -> bool:
    """Whether a name is never that of a checkpoint."""
    return name.startswith(".")


def check(path: str, *, overwrite: bool) -> None:
    """Raises, before anything is written, what `commit` would have to raise in the end.

    Raises:
        CheckpointExistsError: the path is taken; or, with `overwrite`, by something that is no checkpoint.
        UnsupportedFormatError: with `overwrite`, directories cannot be exchanged there.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointExistsError(
            f"{path} exists: choose another path, or pass overwrite=True to replace it"
        )
    inside = os.listdir(path) if os.path.isdir(path) and not os.path.islink(path) else None
    if inside is None or (inside and not any(sign in inside for sign in _SIGNS)):
        raise CheckpointExistsError(
            f"{path} exists and is no checkpoint, so that overwrite=True does not replace it: "
            "move it away, or choose another path"
        )
    if not can_exchange(os.path.dirname(path) or "."):
        raise UnsupportedFormatError(
            f"{path} exists, and its file system cannot exchange two directories in one step, so that it "
            "cannot be replaced safely: save to a new path, and delete the old one afterwards"
        )


def stage(path: str) -> Staging:
    """Makes an empty hidden directory beside `path`, and the directories above it where they are missing.

    Raises:
        SaveError: the file system refuses.
    """
    path = os.path.abspath(path)
    with saving(path):
        parent = os.path.dirname(path)
        _make_directories(parent)
        staging = Staging(path=_temporary(path), target=path)
        os.mkdir(staging.path)  # its mode follows the umask; `mkdtemp` would make it 0700
    return staging


def commit(staging: Staging, *, overwrite: bool = False) -> None:
    """Makes a staged checkpoint durable, then visible, then that durable.

    Files and directories are synced, then one rename (or exchange) puts the checkpoint at its path. Before
    that line no reader can see it; when this returns a power cut cannot undo it. What was replaced is removed
    afterwards, and a crash meanwhile leaves it to `sweep`.

    Raises:
        CheckpointExistsError: somebody else has taken the path meanwhile.
        SaveError: the file system refuses; the staging directory is still there, for `discard`.
    """
    with saving(staging.target):
        sync_tree(staging.path)
        replaced = False
        try:
            rename_new(staging.path, staging.target)  # <- the commit
        except FileExistsError as error:
            if not overwrite:
                message = (
                    f"{staging.target} exists: choose another path, or pass overwrite=True to replace it"
                )
                raise CheckpointExistsError(message) from error
            try:
                exchange(staging.path, staging.target)  # <- the commit
            except NotImplementedError as refusal:
                raise SaveError(f"{staging.target} exists and cannot be replaced: {refusal}") from refusal
            replaced = True
        sync_directory(os.path.dirname(staging.target))
    if replaced:
        discard(staging)


def discard(staging: Staging) -> None:
    """Removes a staging directory, as far as it can be; what is left is swept later."""
    _remove(staging.path)


def abandon(staging: Staging) -> None:
    """`discard`, of a save that failed: other writes of its database may still be under way, and make anew
    directories that were removed.
    """  # noqa: D205
    for pause in (0.0, 0.01, 0.05):
        time.sleep(pause)
        _remove(staging.path)


def remove(path: str) -> None:
    """Deletes a checkpoint: it is gone at once, and never half there.

    Raises:
        OSError: the file system refuses; the checkpoint is still whole.
    """
    path = os.path.abspath(path)
    hidden = _temporary(path)
    os.rename(path, hidden)
    sync_directory(os.path.dirname(path))
    _remove(hidden)


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
            _remove(path)
            if not os.path.lexists(path):
                removed.append(name)
    return removed


def can_exchange(directory: str) -> bool:
    """Whether the file system of an existing directory exchanges two directories in one step; tried there."""
    try:
        return _can_exchange(os.stat(directory).st_dev, os.path.abspath(directory))
    except OSError:
        return False


@cache
def _can_exchange(device: int, directory: str) -> bool:
    del device  # the same path can be another file system later
    first, second = (_temporary(os.path.join(directory, f"probe{i}")) for i in (1, 2))
    try:
        os.mkdir(first)
        os.mkdir(second)
        exchange(first, second)
    except NotImplementedError:
        return False
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                os.rmdir(path)
    return True


def write_file(path: str, data: bytes) -> None:
    """Writes a new file and makes it durable (its name becomes so with its directory)."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        _sync(file.fileno())


def replace_file(path: str, data: bytes) -> None:
    """Writes a file so that every reader sees all of the old or all of the new one, durably."""
    temporary = _temporary(os.path.abspath(path))
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(os.path.dirname(os.path.abspath(path)))


def sync_tree(directory: str) -> None:
    """Makes all files of a tree durable, then the directories, the innermost first."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = os.path.join(parent, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                handle = os.open(path, os.O_RDONLY)
                try:
                    _sync(handle)
                finally:
                    os.close(handle)
        sync_directory(parent)


def sync_directory(directory: str) -> None:
    """Makes the names in a directory durable. Some network file systems have no such thing, and need none."""
    handle = os.open(directory or ".", os.O_RDONLY)
    try:
        _sync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    try:
        import fcntl

        # On macOS fsync stops at the drive's cache.
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:
            fcntl.fcntl(handle, full)
            return
    except (ImportError, OSError):
        pass
    os.fsync(handle)


def _make_directories(path: str) -> None:
    """`os.makedirs`, durably: a checkpoint in a directory that a power cut undoes is no checkpoint."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent != path:
        _make_directories(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
        sync_directory(parent)


def _temporary(path: str) -> str:
    """A hidden path beside `path` that names this process; at most 255 bytes long."""
    parent, name = os.path.split(path)
    owner = process.current()
    host = re.sub(r"[^0-9A-Za-z.]", "_", owner.host)[:40]
    tail = f".{_MARK}-{host}-{_boot_token(owner)}-{owner.pid}-{owner.start}-{secrets.token_hex(6)}"
    room = 254 - len(tail)
    stem = os.fsencode(name)[:room].decode("utf-8", "ignore")
    return os.path.join(parent, f".{stem}{tail}")


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
    path = _temporary(os.path.join(directory, "clock"))
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


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
