"""What listing needs of a manifest, without its graph: of 5000 leaves it costs a few milliseconds. Pure but
for the reading of the one file."""  # noqa: D205, D209

from __future__ import annotations

import os
import re
from typing import Any

import msgspec
from msgspec import Struct

from jaxckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from jaxckpt.storage import manifest
from jaxckpt.storage.chunks import digest
from jaxckpt.storage.format.documents import FilesDoc
from jaxckpt.storage.format.json_values import thaw_json

# The same in every version of the format, see `manifest`.
_START = re.compile(rb'\{"jaxckpt":(\d{1,6}),"digest":"([0-9a-f]{32})",\n')


class Head(Struct, frozen=True, kw_only=True):
    """What a manifest says besides the graph; the attributes are those of `manifest.Files`."""

    sequence: int
    step: int | None
    save_counter: int | None
    writer: str
    committed: float
    metrics: dict[str, float]
    metadata: Any
    nbytes: int
    nbytes_shared: int


class _Saved(msgspec.Struct):  # the graph is skipped
    metadata: Any = None


class _Document(msgspec.Struct):
    graph: _Saved
    files: FilesDoc


_DECODER = msgspec.json.Decoder(_Document)


def read_head(checkpoint: str) -> Head:
    """Reads the head of a checkpoint's manifest, after a look at its digest.

    Raises:
        FileNotFoundError: there is no manifest.
        CorruptCheckpointError: it is damaged.
        UnsupportedFormatError: it is a later release's.
    """
    path = os.path.join(checkpoint, manifest.NAME)
    with open(path, "rb") as file:
        return decode_head(file.read(), path)


def decode_head(data: bytes, source: str) -> Head:
    """Like `read_head`, of bytes; ``source`` is for messages."""
    start = _START.match(data)
    if start is None:
        raise CorruptCheckpointError(f"{source} does not begin as a manifest does", files=[manifest.NAME])
    first, last = start.span(2)
    view = memoryview(data)
    if digest(b"".join([view[:first], view[last:]])).hex().encode() != start[2]:
        raise CorruptCheckpointError(f"the digest of {source} does not fit its bytes", files=[manifest.NAME])
    if int(start[1]) != manifest.VERSION:
        raise UnsupportedFormatError(
            f"{source} has version {int(start[1])} of the format, this release reads {manifest.VERSION}: "
            "upgrade jaxckpt"
        )
    try:
        document = _DECODER.decode(data)
        files = document.files
        metrics = {str(name): float(value) for name, value in (thaw_json(files.metrics) or {}).items()}
        metadata = thaw_json(document.graph.metadata)
    except msgspec.ValidationError as error:  # the digest fits, so this is no damage
        raise UnsupportedFormatError(
            f"{source} says what is not known here ({error}): upgrade jaxckpt"
        ) from error
    except (
        msgspec.DecodeError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CorruptCheckpointError(f"{source} makes no sense: {error}", files=[manifest.NAME]) from error
    return Head(
        sequence=files.sequence,
        step=files.step,
        save_counter=files.save_counter,
        writer=files.writer,
        committed=files.committed,
        metrics=metrics,
        metadata=metadata,
        nbytes=files.nbytes,
        nbytes_shared=files.nbytes_shared,
    )
