"""Whether a saved leaf can stand where the target has another."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jaxckpt.graph.model import ArraySpec, LeafSpec, ValueSpec

if TYPE_CHECKING:
    from jaxckpt.errors import ProblemKind

#: Kinds of numbers by the letters of `numpy.dtype.str`.
_LETTERS = {"i": "int", "u": "int", "f": "float", "c": "complex", "b": "bool"}
#: By the start of a dtype's name ("uint4", "float8_e5m2", "bfloat16").
_NAMES = (("uint", "int"), ("int", "int"), ("float", "float"), ("bfloat", "float"), ("complex", "complex"))
#: Kinds between whose widths ``cast`` converts. Never between kinds, and never bool.
_CASTABLE = frozenset({"int", "float", "complex"})


class Verdict(NamedTuple):
    """How two leaves compare.

    Attributes:
        kind: why they do not fit, or None.
        cast: whether the value is converted to another width, because ``cast`` said so.
        exact: whether the value is converted between Python and an array, where that is exact:
            whether it is, only the value tells.
        hint: what to do when they do not fit.
    """

    kind: ProblemKind | None = None
    cast: bool = False
    exact: bool = False
    hint: str = ""


FITS = Verdict()


def number_kind(dtype: str) -> str:
    """The kind of a dtype: bool, int, float or complex; of any other ("<U5", "<M8[ns]") its letter."""
    if dtype == "bool":
        return "bool"
    for start, kind in _NAMES:
        if dtype.startswith(start):
            return kind
    letter = dtype.lstrip("<>|=")[:1]
    return _LETTERS.get(letter, letter)


def is_inexact(spec: LeafSpec) -> bool:
    """Whether it is an array of a dtype that rounds."""
    return isinstance(spec, ArraySpec) and number_kind(spec.dtype) in ("float", "complex")


def compare(saved: LeafSpec, wanted: LeafSpec, *, cast: bool) -> Verdict:
    """Compares a saved leaf with the target's.

    Sharding, weak type, `jax.Ref` and jax against numpy are the target's business and never differ.
    """
    if isinstance(saved, ArraySpec) and isinstance(wanted, ArraySpec):
        return _arrays(saved, wanted, cast=cast)
    if isinstance(saved, ValueSpec) and isinstance(wanted, ValueSpec):
        return FITS if saved.type == wanted.type else Verdict(kind="kind")
    if isinstance(saved, ValueSpec) and isinstance(wanted, ArraySpec):
        return _scalar(saved, wanted, exact=True)
    if isinstance(saved, ArraySpec) and isinstance(wanted, ValueSpec):
        return _scalar(wanted, saved, exact=False)
    return FITS if saved.kind == wanted.kind else Verdict(kind="kind")


def _arrays(saved: ArraySpec, wanted: ArraySpec, *, cast: bool) -> Verdict:
    if saved.impl != wanted.impl:
        return Verdict(kind="kind", hint=_key_hint(saved, wanted))
    if saved.shape != wanted.shape:
        return Verdict(kind="shape")
    if saved.dtype == wanted.dtype or saved.impl is not None:
        return FITS
    kind = number_kind(saved.dtype)
    if kind not in _CASTABLE or kind != number_kind(wanted.dtype):
        return Verdict(kind="dtype")
    return Verdict(cast=True) if cast else Verdict(kind="dtype", hint="cast=")


def _key_hint(saved: ArraySpec, wanted: ArraySpec) -> str:
    if saved.impl is None:
        return (
            "A raw key and a typed one are different kinds: restore the raw array into a uint32 target "
            f"and make the key with jax.random.wrap_key_data(..., impl={wanted.impl!r})"
        )
    if wanted.impl is None:
        return (
            "A typed key and a raw one are different kinds: restore into a key target "
            "(jax.random.wrap_key_data makes one of raw bits) and take jax.random.key_data of it"
        )
    return (
        f"Keys of another implementation hold other bits: use jax.random.key(seed, impl={saved.impl!r}), "
        "or jax.random.wrap_key_data with that impl"
    )


def _scalar(value: ValueSpec, array: ArraySpec, *, exact: bool) -> Verdict:
    """A Python scalar against an array: the same kind and no dimension."""
    if array.impl is not None or number_kind(array.dtype) != value.type:
        return Verdict(kind="kind")
    return Verdict(kind="shape") if array.shape else Verdict(exact=exact)
