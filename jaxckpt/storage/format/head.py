"""What listing needs of a manifest, without its graph: of 5000 leaves it costs a few milliseconds."""

from __future__ import annotations

import os
from typing import Any

import msgspec
from msgspec import Struct

from jaxckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from jaxckpt.storage.format.documents import FilesDoc
from jaxckpt.storage.format.json_values import thaw_json
from jaxckpt.storage.format.seal import NAME, check_seal


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
    path = os.path.join(checkpoint, NAME)
    with open(path, "rb") as file:
        return decode_head(file.read(), path)


def decode_head(data: bytes, source: str) -> Head:
    """Like `read_head`, of bytes; ``source`` is for messages."""
    check_seal(data, source)
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
        raise CorruptCheckpointError(f"{source} makes no sense: {error}", files=[NAME]) from error
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
