"""Where the bytes of a chunk go in the array that is asked for. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from jaxckpt.storage.chunks import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Array = np.ndarray[Any, np.dtype[Any]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Request(Struct, frozen=True, gc=False):
    """One array to read.

    Attributes:
        entry: index of its entry.
        chunk_shape, shape: of the entry.
        dtype: of the stored values.
        into: writable memory (a buffer of as many bytes as the result has) to fill, in C order; None for a
            new array.
        region: the part to read (a slice with start and stop for each axis), or None for all of it.
    """

    entry: int
    chunk_shape: Shape
    shape: Shape
    dtype: np.dtype[Any]
    into: Any = None
    region: tuple[slice, ...] | None = None


def new_array(request: Request, shape: Shape) -> Array:
    """An array for the result, in the memory that is given for it if any is."""
    if request.into is None:
        return np.empty(shape, request.dtype)
    return np.ndarray(shape, request.dtype, request.into)


def destination(
    request: Request, index: Shape, region: tuple[slice, ...], result: Array, flat: Bytes
) -> tuple[Bytes | None, Callable[[Bytes], None] | None, int]:
    """Where a chunk goes: a slice of the result's bytes, or a function that copies what is asked for.

    Returns:
        Either of them, and the size of the chunk in bytes.
    """
    box = [
        (i * size, min((i + 1) * size, length))
        for i, size, length in zip(index, request.chunk_shape, request.shape, strict=True)
    ]
    itemsize = result.dtype.itemsize
    size = math.prod(b - a for a, b in box) * itemsize
    inside = all(part.start <= a and b <= part.stop for (a, b), part in zip(box, region, strict=True))
    if inside and _contiguous([b - a for a, b in box], result.shape):
        first = ravel([a - part.start for (a, _), part in zip(box, region, strict=True)], result.shape)
        return flat[first * itemsize : first * itemsize + size], None, size
    chunk_shape = tuple(b - a for a, b in box)
    common = [(max(a, part.start), min(b, part.stop)) for (a, b), part in zip(box, region, strict=True)]
    source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))
    target = tuple(slice(a - p.start, b - p.start) for (a, b), p in zip(common, region, strict=True))

    def place(value: Bytes) -> None:
        result[target] = value.view(request.dtype).reshape(chunk_shape)[source]

    return None, place, size


def _contiguous(extent: Sequence[int], shape: Shape) -> bool:
    """Whether a box of that extent lies in one piece in a C-ordered array."""
    partial = [axis for axis, (part, length) in enumerate(zip(extent, shape, strict=True)) if part != length]
    return not partial or all(part == 1 for part in extent[: partial[-1]])


def ravel(index: Sequence[int], shape: Sequence[int]) -> int:
    position = 0
    for i, length in zip(index, shape, strict=True):
        position = position * length + i
    return position
