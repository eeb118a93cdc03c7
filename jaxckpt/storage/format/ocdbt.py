"""Where the values of an OCDBT database lie, read from its tree. Pure but for the reading of its files.

The format is tensorstore's (https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format"), of which
this reads what `kv.write` writes: a single manifest, and nodes that are not compressed. (tensorstore's own
`ocdbt.dump` says the same, and leaks some bytes of memory for each key: megabytes with every save.)
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np

from jaxckpt.storage.chunks import INLINE, Located

MANIFEST = "manifest.ocdbt"
_HEADER = struct.Struct(">I")
_LENGTH = struct.Struct("<Q")
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
_MAX_VARINT = 10

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def located(directory: str) -> Located:
    """Where each value of the newest version lies, in the order of the keys.

    Raises:
        OSError: a file of the database cannot be read.
        ValueError: the database is not of the form that `kv.write` gives it.
    """
    with open(os.path.join(directory, MANIFEST), "rb") as file:
        root = _root(_Cursor(file.read(), _MANIFEST_MAGIC))
    found = _Columns()
    files: dict[str, bytes] = {}
    level = [] if root is None else [(b"", *root)]
    while level:
        below: list[tuple[bytes, str, int, int]] = []
        for prefix, name, offset, length in level:
            if name not in files:
                with open(os.path.join(directory, name), "rb") as file:
                    files[name] = file.read()
            below += _read_node(_Cursor(files[name][offset : offset + length], _NODE_MAGIC), prefix, found)
        level = below
    return Located(
        files=tuple(found.files),
        keys=found.keys,
        file=found.file,
        offset=found.offset,
        length=found.length,
        inline=found.inline,
    )


class _Columns:
    """What `Located` is made of."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.keys: list[bytes] = []
        self.file: list[int] = []
        self.offset: list[int] = []
        self.length: list[int] = []
        self.inline: list[bytes | None] = []


class _Cursor:
    """A manifest or node without its header and checksum, and how far it has been read."""

    def __init__(self, data: bytes, magic: int) -> None:
        if len(data) < 18 or _HEADER.unpack_from(data)[0] != magic:
            raise ValueError("no OCDBT manifest or node where one should be")
        if _LENGTH.unpack_from(data, 4)[0] != len(data):
            raise ValueError("an OCDBT manifest or node of another length than it says")
        self._data, self._bytes = data, np.frombuffer(data, np.uint8)
        self._at, self._end = 12, len(data) - 4
        if self.number() != 0 or self.number() != 0:
            raise ValueError("an OCDBT manifest or node of another version, or compressed")

    def take(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if length < 0 or self._at > self._end:
            raise ValueError("an OCDBT manifest or node is cut off")
        return self._data[start : self._at]

    def number(self) -> int:
        return self.numbers(1)[0]

    def numbers(self, count: int) -> list[int]:
        """So many integers in LEB128."""
        if not count:
            return []
        window = self._bytes[self._at : min(self._end, self._at + count * _MAX_VARINT)]
        ends = np.flatnonzero(window < 0x80)[:count]
        if len(ends) < count:
            raise ValueError("an OCDBT manifest or node is cut off")
        starts = np.concatenate([[0], ends[:-1] + 1])
        self._at += int(ends[-1]) + 1
        if ends[-1] + 1 == count:
            return window[:count].tolist()
        places = np.arange(ends[-1] + 1) - np.repeat(starts, ends - starts + 1)
        parts = (window[: len(places)].astype(np.uint64) & np.uint64(0x7F)) << (7 * places).astype(np.uint64)
        return np.add.reduceat(parts, starts).tolist()

    def texts(self, prefixes: list[int], suffixes: list[int], start: bytes = b"") -> list[bytes]:
        """Texts of which each shares a prefix with the one before; the `start` is that of all."""
        data, at = self.take(sum(suffixes)), 0
        found: list[bytes] = []
        last, skip = b"", len(start)
        for prefix, suffix in zip([0, *prefixes][: len(suffixes)], suffixes, strict=True):
            last = (last[: skip + prefix] if found else start) + data[at : at + suffix]
            found.append(last)
            at += suffix
        return found

    def files(self) -> list[str]:
        """A table of data files, relative to the database."""
        count = self.number()
        prefixes, suffixes = self.numbers(max(0, count - 1)), self.numbers(count)
        self.numbers(count)  # how much of each path holds for the nodes below: nothing, in one database
        return [path.decode() for path in self.texts(prefixes, suffixes)]


def _root(cursor: _Cursor) -> tuple[str, int, int] | None:
    """File, offset and length of the newest root; None for an empty database."""
    cursor.take(16)
    if cursor.number() != 0:
        raise ValueError("an OCDBT database whose manifest is in several files")
    cursor.numbers(2)
    cursor.take(1)
    if cursor.number() != 0:
        cursor.take(4)
    files = cursor.files()
    count = cursor.number()
    cursor.numbers(count)
    cursor.take(count)
    names, offsets, lengths = cursor.numbers(count), cursor.numbers(count), cursor.numbers(count)
    if not count or not lengths[-1]:
        return None
    return files[names[-1]], offsets[-1], lengths[-1]


def _read_node(cursor: _Cursor, prefix: bytes, found: _Columns) -> list[tuple[bytes, str, int, int]]:
    """Adds the values of a leaf; of an inner node gives those below: prefix of their keys, and place."""
    (height,) = cursor.take(1)
    files = cursor.files()
    count = cursor.number()
    prefixes, suffixes = cursor.numbers(count - 1), cursor.numbers(count)
    if height:
        common = cursor.numbers(count)
        keys = cursor.texts(prefixes, suffixes)
        names, offsets, lengths = cursor.numbers(count), cursor.numbers(count), cursor.numbers(count)
        rows = zip(keys, common, names, offsets, lengths, strict=True)
        return [
            (prefix + key[:shared], files[name], offset, length) for key, shared, name, offset, length in rows
        ]
    found.keys += cursor.texts(prefixes, suffixes, prefix)
    lengths, kinds = cursor.numbers(count), cursor.numbers(count)
    outside = np.array(kinds, bool)
    places = np.array([found.files.setdefault(name, len(found.files)) for name in files], np.int64)
    number = int(np.count_nonzero(outside))
    file, offset = np.full(count, INLINE), np.zeros(count, np.int64)
    file[outside] = places[cursor.numbers(number)] if number else INLINE
    offset[outside] = cursor.numbers(number)
    found.length += lengths
    found.file += file.tolist()
    found.offset += offset.tolist()
    found.inline += [
        None if kind else cursor.take(length) for length, kind in zip(lengths, kinds, strict=True)
    ]
    return []
