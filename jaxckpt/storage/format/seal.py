"""The first line of a manifest: version and digest, the same in every version of the format."""

from __future__ import annotations

import re

from jaxckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from jaxckpt.storage.chunks import digest

NAME = "graph.json"
VERSION = 1
_HEAD = re.compile(rb'\{"jaxckpt":(\d{1,6}),"digest":"([0-9a-f]{32})",\n')
# A line ends only between the parts: in a JSON text that is not laid out for reading there is none.
_START, _MIDDLE, _END = b'"graph":', b',\n"files":', b"}\n"


def seal(saved: bytes, files: bytes) -> bytes:
    """Joins the two parts, given as JSON, and signs them with their digest."""
    rest = b'",\n' + _START + saved + _MIDDLE + files + _END
    start = b'{"jaxckpt":%d,"digest":"' % VERSION
    return start + digest(start + rest).hex().encode() + rest


def check_seal(data: bytes, source: str) -> None:
    """Checks the digest of a manifest, and then that its version is this release's.

    Args:
        data: the whole file.
        source: its path, for messages.

    Raises:
        CorruptCheckpointError: any byte differs from what was written.
        UnsupportedFormatError: it was written by a later release.
    """
    head = _HEAD.match(data)
    if head is None:
        raise CorruptCheckpointError(
            f"{source} is damaged: it does not begin as a manifest does", files=[NAME]
        )
    start, stop = head.span(2)
    view = memoryview(data)
    if digest(b"".join([view[:start], view[stop:]])).hex().encode() != head[2]:
        raise CorruptCheckpointError(f"{source} is damaged: its digest does not fit its bytes", files=[NAME])
    if int(head[1]) != VERSION:
        raise UnsupportedFormatError(
            f"{source} has version {int(head[1])} of the format, not {VERSION}: upgrade jaxckpt"
        )


def parts(data: bytes) -> tuple[bytes, bytes] | None:
    """The two parts of a sealed manifest, as `seal` joined them; None if they cannot be told apart."""
    head = _HEAD.match(data)
    middle = data.rfind(_MIDDLE)
    if head is None or middle < 0 or not data.startswith(_START, head.end()) or not data.endswith(_END):
        return None
    return data[head.end() + len(_START) : middle], data[middle + len(_MIDDLE) : -len(_END)]
