"""Whole zarr v2 arrays of a database, read by location. Pure but for `pread`.

For databases without our manifest, hence without digests: what `handler.GraphArrayHandler` gives Orbax.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxckpt.errors import UnsupportedFormatError
from jaxckpt.storage.chunks import chunk_names, chunk_slices
from jaxckpt.storage.dtypes import ORBAX_DTYPES, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxckpt.storage.chunks import LocatedValue, Shape

Array = np.ndarray[Any, np.dtype[Any]]


class ZarrReader:
    """Reads arrays of one database; open files are closed by `close`."""

    def __init__(self, directory: str, located: Mapping[str, LocatedValue]) -> None:
        self._directory = directory
        self._located = located
        self._files: dict[str, int] = {}

    def spec(self, name: str) -> tuple[Shape, Shape, np.dtype[Any]] | None:
        """Shape, chunk shape and dtype of an array whose chunks are its plain bytes; None for any other."""
        document = self._located.get(f"{name}/.zarray" if name else ".zarray")
        if document is None:
            return None
        try:
            fields = json.loads(self._value(document))
            shape, chunk_shape = tuple(fields["shape"]), tuple(fields["chunks"])
            dtype = _dtype(fields["dtype"])
            plain = fields["compressor"] is None and fields["filters"] is None and fields["order"] == "C"
        except (ValueError, KeyError, TypeError, UnsupportedFormatError):
            return None
        divides = all(size % part == 0 for size, part in zip(shape, chunk_shape, strict=True))
        if not plain or not divides or fields.get("dimension_separator", ".") != ".":
            return None
        return shape, chunk_shape, dtype

    def read(self, name: str, shape: Shape, chunk_shape: Shape, dtype: np.dtype[Any]) -> Array | None:
        """The array; None if a chunk is not there, or not of its size."""
        prefix = f"{name}/" if name else ""
        result = np.empty(shape, dtype)
        size = math.prod(chunk_shape) * dtype.itemsize
        places = zip(chunk_names(shape, chunk_shape), chunk_slices(shape, chunk_shape), strict=True)
        for chunk, slices in places:
            value = self._located.get(prefix + chunk)
            if value is None or value.length != size:
                return None
            data = np.frombuffer(self._value(value), dtype)
            if data.size != math.prod(chunk_shape):
                return None
            result[slices] = data.reshape(chunk_shape)
        return result

    def close(self) -> None:
        """Closes the data files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _value(self, value: LocatedValue) -> bytes:
        if value.file is None:
            return value.inline or b""
        descriptor = self._files.get(value.file)
        if descriptor is None:
            path = os.path.join(self._directory, value.file)
            descriptor = self._files[value.file] = os.open(path, os.O_RDONLY)
        return os.pread(descriptor, value.length, value.offset)


def _dtype(name: str) -> np.dtype[Any]:
    return numpy_dtype(name) if name in ORBAX_DTYPES else np.dtype(_checked(name))


def _checked(name: str) -> str:
    if name[:1] not in "<|" or name[1:2] not in "biufc" or not name[2:].isdigit():
        raise UnsupportedFormatError(f"no dtype of zarr: {name!r}")
    return name
