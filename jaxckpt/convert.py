"""From what was saved to what the target holds: casts, exact conversions, transforms of host values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxckpt.errors import Problem, ProblemKind
from jaxckpt.graph.model import ArraySpec, Leaf, LeafSpec, ValueSpec
from jaxckpt.storage.format.dtypes import dtype_name, numpy_dtype

Array = npt.NDArray[Any]


class MisfitError(Exception):
    """A value, once read, does not fit its place; becomes a `Problem`."""

    def __init__(self, *, kind: ProblemKind, saved: str, wanted: str, hint: str = "") -> None:
        super().__init__(f"{kind}: saved {saved}, wanted {wanted}")
        self.kind: ProblemKind = kind
        self.saved = saved
        self.wanted = wanted
        self.hint = hint

    def problem(self, key: str) -> Problem:
        """The problem of the leaf with this key."""
        return Problem(key=key, kind=self.kind, saved=self.saved, wanted=self.wanted, hint=self.hint)


def convert(value: Any, saved: LeafSpec, wanted: LeafSpec, *, cast: bool) -> Any:
    """One saved value as the target has it: an array of the target's dtype, or a Python value.

    Args:
        value: a numpy array, or the Python value.
        saved: what it was saved as.
        wanted: what the target has.
        cast: whether a float may lose precision.

    Raises:
        MisfitError: it cannot be done without a loss that was not asked for.
    """
    if isinstance(wanted, ArraySpec):
        dtype = numpy_dtype(wanted.dtype)
        if isinstance(saved, ValueSpec):
            return _exact_array(value, dtype, saved, wanted, cast)
        return value if value.dtype == dtype else _cast(value, dtype, saved, wanted)
    if isinstance(wanted, ValueSpec) and isinstance(saved, ArraySpec):
        return _exact_value(value, wanted)
    return value


def check_result(result: Any, wanted: LeafSpec, sources: str) -> Any:
    """What a transform gave, as a host array, or as a Python value where the target has one.

    Raises:
        MisfitError: its shape or dtype is not the target's.
    """
    array = np.asarray(result)
    if isinstance(wanted, ValueSpec):
        if array.shape or _number_type(array.dtype) != wanted.type:
            given = f"{dtype_name(array.dtype)}[{', '.join(map(str, array.shape))}]"
            raise MisfitError(kind="kind", saved=f"{given} (the transform of {sources})", wanted=str(wanted))
        return _exact_value(array, wanted)
    assert isinstance(wanted, ArraySpec)
    if array.shape != wanted.stored_shape or array.dtype != numpy_dtype(wanted.dtype):
        given = f"{dtype_name(array.dtype)}[{', '.join(map(str, array.shape))}]"
        kind: ProblemKind = "shape" if array.shape != wanted.stored_shape else "dtype"
        raise MisfitError(
            kind=kind,
            saved=f"{given} (the transform of {sources})",
            wanted=str(wanted),
            hint="the function must give the target's shape and the saved dtype",
        )
    return array


def same(values: Sequence[Any]) -> bool:
    """Whether all values are equal, bit for bit."""
    first = np.asarray(values[0])
    return all(_bits(np.asarray(value)) == _bits(first) for value in values[1:])


def _bits(array: Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, array.tobytes()


def _cast(value: Array, dtype: np.dtype[Any], saved: LeafSpec, wanted: LeafSpec) -> Array:
    # Matching has seen to it that both are floats (of any width), or both integers.
    if _is_integer(value.dtype) and value.size:
        low, high = _bounds(dtype)
        least, most = int(value.min()), int(value.max())
        if least < low or most > high:
            raise MisfitError(
                kind="dtype",
                saved=f"{saved} with values from {least} to {most}",
                wanted=f"{wanted}, which holds {low} to {high}",
                hint="an integer is only cast where every value fits",
            )
    with np.errstate(all="ignore"):  # what is too large for a float becomes infinite, as asked
        return value.astype(dtype)


def _exact_array(value: Any, dtype: np.dtype[Any], saved: ValueSpec, wanted: ArraySpec, cast: bool) -> Array:
    if _is_integer(dtype):
        low, high = _bounds(dtype)
        if not low <= value <= high:
            raise MisfitError(
                kind="dtype", saved=f"the int {value}", wanted=f"{wanted}, which holds {low} to {high}"
            )
        return (
            np.asarray(int(value)).astype(dtype)
            if abs(int(value)) < 2**63
            else np.asarray(value, dtype=dtype)
        )
    with np.errstate(all="ignore"):  # the comparison tells
        array = np.asarray(value).astype(dtype)
        back = array.astype(np.asarray(value).dtype).item()
    if cast:
        return array
    if back != value and not (value != value and back != back):  # NaN is NaN
        raise MisfitError(
            kind="dtype",
            saved=f"the {saved.type} {value!r}",
            wanted=f"{wanted}, which would hold {back!r}",
            hint="keep it a Python number in the target, or allow the loss with cast=",
        )
    return array


def _exact_value(value: Array, wanted: ValueSpec) -> Any:
    item = value.item() if value.dtype.kind in "biufc" else value.astype(np.float64).item()
    kinds: dict[str, type[Any]] = {"int": int, "float": float, "complex": complex, "bool": bool}
    return kinds[wanted.type](item)


def _number_type(dtype: np.dtype[Any]) -> str:
    """The Python type that a number of this dtype becomes."""
    if _is_integer(dtype):
        return "int"
    return {"b": "bool", "c": "complex", "f": "float", "V": "float"}.get(dtype.kind, "")


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" or dtype_name(dtype).removeprefix("u").startswith("int")


def _bounds(dtype: np.dtype[Any]) -> tuple[int, int]:
    name = (
        dtype_name(dtype)
        if dtype.kind not in "iu"
        else f"{'u' if dtype.kind == 'u' else ''}int{dtype.itemsize * 8}"
    )
    bits = int(name.rpartition("int")[2])
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def describe(leaves: Sequence[Leaf]) -> str:
    """The keys of leaves, for messages."""
    return ", ".join(leaf.key for leaf in leaves[:5]) + (
        f" and {len(leaves) - 5} more" if len(leaves) > 5 else ""
    )
