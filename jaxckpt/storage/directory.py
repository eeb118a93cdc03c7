"""Staging, committing and sweeping directories: the only place where checkpoints appear and disappear.

A checkpoint is written into a hidden directory beside its path (`hidden`) and becomes visible by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from functools import cache
from typing import TYPE_CHECKING

from msgspec import Struct

from jaxckpt.errors import CheckpointExistsError, SaveError, UnsupportedFormatError
from jaxckpt.storage.exchange import exchange, rename_new
from jaxckpt.storage.hidden import MARK, remove_tree, temporary
from jaxckpt.storage.hidden import is_hidden as is_hidden
from jaxckpt.storage.hidden import sweep as sweep

if TYPE_CHECKING:
    from collections.abc import Generator

# How long a failed save waits for what it has begun to write.
_PATIENCE = 10.0
_GIVE_UP_SECONDS = 2.0
# One of these is in every checkpoint that `overwrite` may replace.
_SIGNS = ("graph.json", "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "commit_success.txt")

# Of this process: staging directories in use, each with a handle by which to know it; those that were
# abandoned; whether all of it is given up, which no commit may follow.
_live: dict[str, int] = {}
_left: set[str] = set()
_given_up = False
_renaming = threading.Lock()


class Staging(Struct, frozen=True, kw_only=True):
    """A checkpoint on its way.

    Attributes:
        path: the hidden directory that is written to.
        target: where it will be.
    """

    path: str
    target: str


@contextlib.contextmanager
def saving(path: str, nbytes: int | None = None) -> Generator[None]:
    """Turns what the operating system refuses into a `SaveError` that says what it was, and what to do.

    Args:
        path: the checkpoint.
        nbytes: how many bytes it is to have, where that is known.
    """
    try:
        yield
    except CheckpointExistsError:
        raise
    except OSError as error:
        if isinstance(error, SaveError) and path in str(error):
            raise
        name = str(error.filename or path)
        where = f" ({name})" if name != path and MARK not in name else ""
        wanted = "" if nbytes is None else f" (it takes {nbytes:,} bytes)"
        remedy = _REMEDIES.get(error.errno or 0, "")
        cause = error.strerror or (os.strerror(error.errno) if error.errno else error)
        failure = SaveError(f"{path} could not be written: {cause}{where}{wanted}{remedy}")
        failure.errno = error.errno
        raise failure from error


_MAY_WRITE = ". Choose a directory that you may write to"
_REMEDIES = {
    errno.ENOSPC: ". Free some space, or keep fewer checkpoints (`max_to_keep`)",
    errno.EDQUOT: ". Free some of your quota, or keep fewer checkpoints (`max_to_keep`)",
    errno.EFBIG: ". Raise the limit on the size of files (`ulimit -f`)",
    errno.EMFILE: ". Raise the limit on open files (`ulimit -n`)",
    errno.ENOENT: ". Was the directory removed meanwhile? The next save makes it anew",
    errno.EACCES: _MAY_WRITE,
    errno.EPERM: _MAY_WRITE,
    errno.EROFS: _MAY_WRITE,
}


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


def stage(path: str, nbytes: int | None = None) -> Staging:
    """Makes an empty hidden directory beside `path`, and the directories above it where they are missing.

    Args:
        path: of the checkpoint.
        nbytes: as of `saving`.

    Raises:
        SaveError: the file system refuses.
    """
    path = os.path.abspath(path)
    remove_left()
    with saving(path, nbytes):
        parent = os.path.dirname(path)
        _make_directories(parent)
        staging = Staging(path=temporary(path), target=path)
        with _renaming:
            _refuse_given_up()
            os.mkdir(staging.path)  # its mode follows the umask; `mkdtemp` would make it 0700
            _live[staging.path] = os.open(staging.path, os.O_RDONLY)
    return staging


def commit(staging: Staging, *, overwrite: bool = False, nbytes: int | None = None) -> None:
    """Makes a staged checkpoint durable, then visible, then that durable.

    Files and directories are synced, then one rename (or exchange) puts the checkpoint at its path. Before
    that line no reader can see it; when this returns a power cut cannot undo it. What was replaced is removed
    afterwards, and a crash meanwhile leaves it to `sweep`.

    Args:
        staging: what `stage` has made, and somebody has filled.
        overwrite: whether a checkpoint that is there is replaced.
        nbytes: of all files; checked where it is given.

    Raises:
        CheckpointExistsError: somebody else has taken the path meanwhile.
        SaveError: the file system refuses, or somebody has removed files meanwhile; the staging directory is
            still there, for `abandon`.
    """
    with saving(staging.target, nbytes):
        found = sync_tree(staging.path)
        with _renaming:
            _refuse_given_up()
            if not _is_whole(staging) or (nbytes is not None and found != nbytes):
                raise FileNotFoundError(errno.ENOENT, "files of it were removed meanwhile", staging.target)
            replaced = _put_in_place(staging, overwrite=overwrite)
        sync_directory(os.path.dirname(staging.target))
    if replaced:
        remove_tree(staging.path)
    _forget(staging)


def _is_whole(staging: Staging) -> bool:
    """Whether the directory is the one that was made: storage makes anew what somebody removes."""
    handle = _live.get(staging.path)
    return handle is None or os.path.samestat(os.fstat(handle), os.stat(staging.path))


def _put_in_place(staging: Staging, *, overwrite: bool) -> bool:
    """Returns whether the staging directory now holds what was there before."""
    try:
        rename_new(staging.path, staging.target)  # <- the commit
        return False
    except FileExistsError as error:
        if not overwrite:
            message = f"{staging.target} exists: choose another path, or pass overwrite=True to replace it"
            raise CheckpointExistsError(message) from error
    try:
        exchange(staging.path, staging.target)  # <- the commit
    except NotImplementedError as refusal:
        raise SaveError(f"{staging.target} exists and cannot be replaced: {refusal}") from refusal
    return True


def abandon(staging: Staging) -> None:
    """Removes a staging directory after a failure.

    A write that has failed has others beside it, of which storage does not say when they end. Each makes its
    file anew, with the directories above, so that this waits for them: until nothing appears there any more,
    but `_PATIENCE` at the most. What comes later is removed by the next `stage`, at the exit, or by `sweep`.
    """
    until = time.monotonic() + _PATIENCE
    quiet = 0  # looks in a row between which nothing has happened
    while quiet < 3 and time.monotonic() < until:
        before, writing = os.path.lexists(staging.path), _writes_below(staging.path)
        remove_tree(staging.path)
        quiet = 0 if writing or before != os.path.lexists(staging.path) else quiet + 1
        time.sleep(0.01)
    _left.add(staging.path)
    _forget(staging)


def remove_left() -> None:
    """Looks again at what was abandoned."""
    while _left:
        remove_tree(_left.pop())


def give_up() -> bool:
    """Makes every save of this process fail from now on, and removes what there is of them.

    Returns:
        Whether nothing is left.
    """
    global _given_up
    _given_up = True
    until = time.monotonic() + _GIVE_UP_SECONDS
    if not _renaming.acquire(timeout=_GIVE_UP_SECONDS):
        return False  # a rename that does not end may yet have made a checkpoint of it
    _renaming.release()
    while True:
        paths = list(_live)
        for path in paths:
            remove_tree(path)
        if not paths or time.monotonic() > until:
            return not any(map(os.path.lexists, paths))
        time.sleep(0.01)


def _refuse_given_up() -> None:
    if _given_up:
        raise SaveError("this save was given up (Ctrl-C at the end of the program)")


def _forget(staging: Staging) -> None:
    handle = _live.pop(staging.path, None)
    if handle is not None:
        os.close(handle)


def _writes_below(path: str) -> bool:
    """Whether this process has files in a directory open, removed ones too; on Linux, which tells."""
    parent, name = os.path.split(path)
    below = os.path.join(os.path.realpath(parent), name, "")
    try:
        handles = os.listdir("/proc/self/fd")
    except OSError:
        return False
    for handle in handles:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{handle}").startswith(below):
                return True
    return False


def can_exchange(directory: str) -> bool:
    """Whether the file system of an existing directory exchanges two directories in one step; tried there."""
    try:
        return _can_exchange(os.stat(directory).st_dev, os.path.abspath(directory))
    except OSError:
        return False


@cache
def _can_exchange(device: int, directory: str) -> bool:
    del device  # the same path can be another file system later
    first, second = (temporary(os.path.join(directory, f"probe{i}")) for i in (1, 2))
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
    new = temporary(os.path.abspath(path))
    try:
        write_file(new, data)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    sync_directory(os.path.dirname(os.path.abspath(path)))


def sync_tree(directory: str) -> int:
    """Makes all files of a tree durable, then the directories, the innermost first; returns their bytes."""
    nbytes = 0
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                nbytes += status.st_size
                handle = os.open(path, os.O_RDONLY)
                try:
                    _sync(handle)
                finally:
                    os.close(handle)
        sync_directory(parent)
    return nbytes


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


def _forget_all() -> None:
    """For a forked child: its parent's saves are none of its own."""
    global _renaming
    for handle in _live.values():
        os.close(handle)
    _live.clear()
    _left.clear()
    _renaming = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
