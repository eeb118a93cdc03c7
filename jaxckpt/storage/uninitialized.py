"""Arrays that XLA makes on a CPU without writing to them, for whoever writes to them next.

`jax.lax.empty` fills with zeros there, with a kernel for each shape: 0.1 s for a GiB, 15 ms a shape. Here a
program consists of one call of a function of ours that does nothing.

The function is a handler of XLA's foreign function interface, whose C structures (``xla/ffi/api/c_api.h`` in
`jax.ffi.include_dir()`) begin with their size and only ever grow. It reads those by which XLA asks, once, for
the version of the interface; where a size is not as expected it answers nothing, so that XLA refuses it.
"""

from __future__ import annotations

from ctypes import CFUNCTYPE, POINTER, Structure, c_int, c_size_t, c_uint32, c_void_p, cast, sizeof
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

_NAME = "jaxckpt_uninitialized"
_METADATA = 1  # XLA_FFI_Extension_Metadata


class _Version(Structure):
    """``XLA_FFI_Api_Version``."""

    _fields_ = (("size", c_size_t), ("next", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    """``XLA_FFI_Metadata``, as far as it is looked at."""

    _fields_ = (("size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _Extension(Structure):
    """``XLA_FFI_Metadata_Extension``; any other kind ends before `metadata`."""

    _fields_ = (("size", c_size_t), ("kind", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata)))


class _Interface(Structure):
    """``XLA_FFI_Api``, as far as it is looked at."""

    _fields_ = (("size", c_size_t), ("next", c_void_p), ("version", _Version))


class _Call(Structure):
    """``XLA_FFI_CallFrame``, as far as it is looked at."""

    _fields_ = (("size", c_size_t), ("extension", POINTER(_Extension)), ("interface", POINTER(_Interface)))


def _handler(frame: Any) -> None:
    """Does nothing, and says that it is of XLA's own version when asked."""
    call = frame.contents
    if call.size < sizeof(_Call) or not call.extension or call.extension.contents.kind != _METADATA:
        return
    extension, interface = call.extension.contents, call.interface.contents
    if extension.size != sizeof(_Extension) or interface.size < sizeof(_Interface):
        return
    metadata = extension.metadata.contents
    if metadata.size >= _Metadata.traits.offset and metadata.version.size == sizeof(_Version):
        metadata.version.major = interface.version.major
        metadata.version.minor = interface.version.minor


# Kept for as long as the process lives, as XLA keeps its address.
_function = CFUNCTYPE(c_void_p, POINTER(_Call))(_handler)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether XLA takes the function."""
    try:
        address = cast(_function, c_void_p).value
        jax.ffi.register_ffi_target(_NAME, jax.ffi.pycapsule(address), platform="cpu")
    except Exception:  # another interface: whatever it says, it is not for us
        return False
    return True


def uninitialized(forms: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> tuple[jax.Array, ...]:
    """Arrays of these shapes and dtypes, of whatever values; inside a program for a CPU only.

    The function has to be `available`.
    """
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in forms]
    return tuple(jax.ffi.ffi_call(_NAME, results)())
