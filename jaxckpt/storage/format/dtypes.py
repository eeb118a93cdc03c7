"""Names of dtypes as files and specs spell them. Pure: numpy and ml_dtypes only.

A name is numpy's or ml_dtypes' own ("float32", "bfloat16", "int4") where it says all, else numpy's
``dtype.str`` ("<U5", ">f4", "<M8[ns]").
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from jaxckpt.errors import UnsupportedFormatError

Array = np.ndarray[Any, np.dtype[Any]]
DType = np.dtype[Any]


def _extended() -> dict[str, DType]:
    found: dict[str, DType] = {}
    for name in dir(ml_dtypes):
        scalar = getattr(ml_dtypes, name)
        if isinstance(scalar, type) and issubclass(scalar, np.generic):
            found[np.dtype(scalar).name] = np.dtype(scalar)
    return found


_EXTENDED = _extended()
# By name: of the C types of one width numpy has several scalar classes ("q" is no `numpy.int64` on Linux).
_NATIVE: dict[str, DType] = {np.dtype(c).name: np.dtype(np.dtype(c).name) for c in "?bhilqBHILQefdgFDG"}
#: numpy's `dtype.str` of what a name does not describe. A closed list: `np.dtype` itself would also take
#: structures, objects and comma-separated records from a hostile file.
_STRINGS = re.compile(
    r"[<>][iu][248]|[<>]f(?:2|4|8|16)|[<>]c(?:8|16|32)|[<>]U\d{1,8}|\|[SV]\d{1,9}|[<>][mM]8(?:\[\d{0,9}[A-Za-z]{1,2}\])?"
)
_BITS = dict(int1=1, uint1=1, int2=2, uint2=2, int4=4, uint4=4)  # noqa: C408
_BITS.update(float4_e2m1fn=4, float6_e2m3fn=6, float6_e3m2fn=6)

#: What Orbax 0.12.8 can hold: tensorstore 0.1.86 has these in its zarr driver, in native byte order.
ORBAX_DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16"),
        *("float32", "float64", "complex64", "complex128", "bfloat16", "int2", "int4", "float4_e2m1fn"),
        *("float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
        *("float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)


def numpy_dtype(name: str) -> DType:
    """The dtype of a name.

    Raises:
        UnsupportedFormatError: no dtype of that name here; nothing but plain data types is ever accepted.
    """
    known = _NATIVE.get(name) or _EXTENDED.get(name)
    if known is not None:
        return known
    if _STRINGS.fullmatch(name):
        try:
            return np.dtype(name)
        except TypeError:
            pass
    raise UnsupportedFormatError(
        f"there is no dtype {name[:60]!r} in numpy {np.__version__} and ml_dtypes {ml_dtypes.__version__}: "
        "upgrade jaxckpt and ml_dtypes"
    )


def dtype_name(dtype: DType) -> str:
    """The name of a dtype: the inverse of `numpy_dtype`.

    Raises:
        TypeError: values of that dtype are not plain bytes (objects, structures, variable-width strings).
    """
    if dtype.name in _EXTENDED and dtype == _EXTENDED[dtype.name]:
        return dtype.name
    if dtype.isnative and dtype.name in _NATIVE:
        return dtype.name
    if dtype.fields is None and dtype.subdtype is None and _STRINGS.fullmatch(dtype.str):
        return dtype.str
    raise TypeError(f"arrays of dtype {dtype} cannot be saved: their values are not plain bytes")


def element_bits(name: str) -> int | None:
    """Significant bits of one element of a sub-byte dtype (each is kept in a byte of its own), else None."""
    return _BITS.get(name)


def mask_sub_byte(array: Array) -> Array:
    """The array with the unused high bits of each byte zeroed, so that equal values have equal bytes.

    Args:
        array: of any dtype; other than sub-byte ones come back as they are.

    Returns:
        The argument itself where nothing has to change, else a new C-contiguous array of its dtype.
    """
    bits = _BITS.get(array.dtype.name)
    if bits is None or not array.size:
        return array
    raw = np.ascontiguousarray(array).view(np.uint8)
    mask = (1 << bits) - 1
    if int(raw.max()) <= mask:
        return array
    return (raw & np.uint8(mask)).view(array.dtype).reshape(array.shape)
