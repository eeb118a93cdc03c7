"""Exchanging two directories in one step: ``renameat2(2)`` on Linux, ``renamex_np(2)`` on macOS."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

_AT_FDCWD = -100
# Linux, <linux/fs.h>; macOS, <sys/stdio.h>
_NO_REPLACE = 4 if sys.platform == "darwin" else 1
_EXCHANGE = 2
# Before glibc 2.28 the function is missing but the system call is there.
_SYSCALL = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}
_REFUSED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(first: str, second: str) -> None:
    """Exchanges two paths of one file system: at every instant each names one of the two, whole.

    Raises:
        NotImplementedError: the system or the file system cannot do it.
        OSError: it failed.
    """
    _rename(first, second, _EXCHANGE)


def rename_new(source: str, target: str) -> None:
    """Renames onto a path that must not exist; a plain rename would replace an empty directory.

    Raises:
        FileExistsError: `target` exists.
        OSError: it failed.
    """
    try:
        _rename(source, target, _NO_REPLACE)
    except NotImplementedError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
            raise


def _rename(first: str, second: str, flags: int) -> None:
    a, b, options = os.fsencode(first), os.fsencode(second), ctypes.c_uint(flags)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            result = library.renamex_np(a, b, options)
        elif hasattr(library, "renameat2"):
            result = library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, options)
        else:
            result = library.syscall(_SYSCALL[os.uname().machine], _AT_FDCWD, a, _AT_FDCWD, b, options)
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise NotImplementedError(f"{sys.platform} has no such call") from error
    if result != 0:
        code = ctypes.get_errno()
        if code in _REFUSED:
            raise NotImplementedError(os.strerror(code))
        raise OSError(code, os.strerror(code), first, None, second)
