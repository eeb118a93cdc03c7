"""Databases written and looked at value by value."""

from typing import NamedTuple

from jaxckpt.storage import kv, kv_dump
from jaxckpt.storage.plan import prepare


class Value(NamedTuple):
    """Where one value lies."""

    key: str
    file: str | None
    offset: int
    length: int
    inline: bytes | None


def values(located):
    """The columns of a `chunks.Located` as rows."""
    return [
        Value(key.decode(), None if file < 0 else located.files[file], offset, length, inline)
        for key, file, offset, length, inline in zip(
            located.keys, located.file, located.offset, located.length, located.inline, strict=True
        )
    ]


def locate(directory):
    return values(kv_dump.locate(str(directory)))


def array(key, host, chunk_shape=None, *, raw=False):
    """An item of a database, and its values."""
    chunks = host.shape if chunk_shape is None else chunk_shape
    return prepare(key, host.shape, host.dtype, chunks, raw=raw), host


def write(directory, arrays, aliases=(), *, writer=kv.write, **options):
    """`kv.write` of pairs that `array` made."""
    items, hosts = [item for item, _ in arrays], [host for _, host in arrays]
    return values(writer(str(directory), items, hosts, aliases, **options).located)
