"""Which process wrote something, and whether it still lives."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import sys
import uuid
from dataclasses import dataclass
from functools import cache

_IMPORTED_IN = os.getpid()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process, told apart from every other one, also from a later one with the same number.

    Attributes:
        host: name of the host (and of the container: what `socket.gethostname` says).
        boot: a token of the boot and of the process namespace; numbers of processes are unique within it.
        pid: its number.
        start: when it started, in the system's own ticks since the boot; empty where that is not known.
    """

    host: str
    boot: str
    pid: int
    start: str


def was_forked() -> bool:
    """Whether this is a child forked after this library was imported: jax's and tensorstore's threads, which
    do not live on in it, may have been running.
    """  # noqa: D205
    return os.getpid() != _IMPORTED_IN


def current() -> ProcessId:
    """This process; after a fork the child has its own."""
    pid = os.getpid()
    return ProcessId(host=_host(), boot=_boot(), pid=pid, start=start_time(pid) or "")


def is_alive(process: ProcessId) -> bool | None:
    """Whether that process lives. None where it cannot be told: on another host, or of another boot.

    The boot token decides, not the host's name: containers share names, and a token that is not ours is a
    machine or a process namespace into which we cannot look.
    """
    if process.boot != _boot():
        return None
    if process.pid != os.getpid():
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it lives, and belongs to somebody else
        except (OSError, OverflowError):
            return None
    if not process.start:
        return True
    start = start_time(process.pid)
    if start is None:  # ended just now, or a zombie; elsewhere the system may not say
        return False if sys.platform.startswith("linux") else None
    return start == process.start


def start_time(pid: int) -> str | None:
    """When a process started, as an opaque string that a later process of that number does not have.

    None if there is no such process, if it is a zombie (ended, not yet waited for), or if the system does
    not say.
    """
    if sys.platform.startswith("linux"):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The name, in brackets, may hold anything; what follows is state (field 3) ... start (22).
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if len(fields) < 20 or fields[0] in (b"Z", b"X") else fields[19].decode()
    if sys.platform == "darwin":
        return _darwin_start(pid)
    return None


@cache
def _host() -> str:
    return socket.gethostname() or "localhost"


@cache
def _boot() -> str:
    """Identifies the boot and, on Linux, the process namespace."""
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                boot = file.read().strip()
            return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
        except OSError:
            pass
    if sys.platform == "darwin":
        found = re.search(rb"sec = (\d+), usec = (\d+)", _darwin_sysctl("kern.boottime"))
        if found:
            return f"{_host()}.{int(found[1])}.{int(found[2])}"
    # Nothing to go by: then nobody but this very process is known to it.
    return uuid.uuid4().hex


def _darwin_sysctl(name: str) -> bytes:
    import subprocess

    try:
        return subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def _darwin_start(pid: int) -> str | None:
    """`proc_pidinfo(PROC_PIDTBSDINFO)`: start time in seconds and microseconds."""
    try:
        library = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
        buffer = ctypes.create_string_buffer(136)  # struct proc_bsdinfo
        if library.proc_pidinfo(pid, 3, ctypes.c_uint64(0), buffer, 136) != 136:
            return None
    except (OSError, AttributeError):
        return None
    seconds = int.from_bytes(buffer.raw[120:128], sys.byteorder)
    return f"{seconds}.{int.from_bytes(buffer.raw[128:136], sys.byteorder)}"
