"""zarr v2: the document of an array, and whole arrays of a database read by location. Pure but for `pread`.

https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html. The reader is for databases without our manifest,
hence without digests: what `handler.GraphArrayHandler` gives Orbax.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxckpt.storage.chunks import chunk_names, chunk_slices
from jaxckpt.storage.format.dtypes import ORBAX_DTYPES, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxckpt.storage.chunks import Located, Shape

Array = np.ndarray[Any, np.dtype[Any]]

_NAMES = {
    **{
        f"{kind}{bits}": f"<{kind[0]}{bits // 8}"
        for kind in ("int", "uint", "float")
        for bits in (16, 32, 64)
    },
    "bool": "|b1",
    "int8": "|i1",
    "uint8": "|u1",
    "complex64": "<c8",
    "complex128": "<c16",
}
# The rest are extensions of tensorstore's, of the name that ml_dtypes has too.
_DTYPES = {_NAMES.get(name, name): name for name in ORBAX_DTYPES}


def zarray(shape: Sequence[int], chunk_shape: Sequence[int], dtype_name: str) -> bytes:
    """The ``.zarray`` document of an array without compressor, filters and fill value.

    A chunk may not be empty, so that a dimension of size 0 is said to have chunks of 1.
    """
    document = {
        "chunks": [max(1, size) for size in chunk_shape],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _NAMES.get(dtype_name, dtype_name),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(document, separators=(",", ":")).encode()


class ZarrReader:
    """Reads arrays of one database; open files are closed by `close`."""

    def __init__(self, directory: str, located: Located) -> None:
        self._directory = directory
        self._located = located
        self._rows = {key.decode("utf-8", "surrogateescape"): i for i, key in enumerate(located.keys)}
        self._files: dict[str, int] = {}

    def spec(self, name: str) -> tuple[Shape, Shape, np.dtype[Any]] | None:
        """Shape, chunk shape and dtype of an array whose chunks are its plain bytes; None for any other."""
        document = self._rows.get(f"{name}/.zarray" if name else ".zarray")
        if document is None:
            return None
        try:
            fields = json.loads(self._value(document))
            shape, chunk_shape = tuple(fields["shape"]), tuple(fields["chunks"])
            dtype = numpy_dtype(_DTYPES[fields["dtype"]])
            plain = fields["compressor"] is None and fields["filters"] is None and fields["order"] == "C"
        except (ValueError, KeyError, TypeError):
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
            row = self._rows.get(prefix + chunk)
            if row is None or self._located.length[row] != size:
                return None
            data = np.frombuffer(self._value(row), dtype)
            if data.size != math.prod(chunk_shape):
                return None
            result[slices] = data.reshape(chunk_shape)
        return result

    def close(self) -> None:
        """Closes the data files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _value(self, row: int) -> bytes:
        located = self._located
        inline = located.inline[row]
        if inline is not None:
            return inline
        name = located.files[located.file[row]]
        descriptor = self._files.get(name)
        if descriptor is None:
            path = os.path.join(self._directory, name)
            descriptor = self._files[name] = os.open(path, os.O_RDONLY)
        return os.pread(descriptor, located.length[row], located.offset[row])
