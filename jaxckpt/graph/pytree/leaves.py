"""What one leaf is: values to specs, and what cannot be saved to a reason and a remedy."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import io
import itertools
import os
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, SingleDeviceSharding
from msgspec import Struct

from jaxckpt.graph.model import (
    ArraySpec,
    CallableSpec,
    IteratorSpec,
    LeafSpec,
    Sharding,
    SkippedSpec,
    ValueSpec,
)

#: More kinds of leaf than this are not remembered: shapes that change with every save must not pile up.
_MAX_KNOWN = 65_536


class UnsavableError(Exception):
    """Why a leaf cannot be saved and what to do: the message without the key."""


class Kind(Struct, frozen=True):
    """What can be said of a leaf without its identity, kept once for all leaves like it.

    Attributes:
        spec: its spec; for Python values and iterators without the value.
        token: equal for leaves of an equal kind, never used again for another.
        shares: whether the same object at two positions is one node.
        fill: whether the spec still wants the value.
    """

    spec: LeafSpec
    token: int
    shares: bool = False
    fill: bool = False


_tokens = itertools.count()
_known: dict[object, Kind] = {}


def _kind(
    signature: object, make: Callable[[], LeafSpec], *, shares: bool = False, fill: bool = False
) -> Kind:
    kind = _known.get(signature)
    if kind is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()  # tokens are not reused, so graphs remembered under the old ones are merely lost
        kind = _known[signature] = Kind(make(), next(_tokens), shares, fill)
    return kind


def classify(value: object, *, target: bool) -> Kind:
    """The kind of a leaf.

    Args:
        value: the leaf.
        target: whether the tree is to be restored into (abstract arrays, ``...`` and deleted arrays are
            welcome) or saved (they are not).

    Raises:
        UnsavableError: if it cannot be saved.
    """
    cls = type(value)
    handler = _HANDLERS.get(cls)
    if handler is None:
        handler = _handler(value)
        if handler in _LASTING:  # others may depend on the object, and a class is not kept alive for them
            _HANDLERS[cls] = handler
    return handler(value, target)


# ---- arrays ----


def dtype_name(dtype: np.dtype[Any]) -> str:
    """A dtype as specs spell it: its name, or numpy's ``dtype.str`` where the name does not say all."""
    return dtype.str if dtype.kind in "SUMm" or not dtype.isnative else dtype.name


def describe_sharding(sharding: Any, shape: tuple[int, ...]) -> Sharding | None:
    """A `jax.sharding.Sharding` as plain data; None for a single device and its default memory."""
    memory = sharding.memory_kind
    if isinstance(sharding, SingleDeviceSharding):
        (device,) = sharding.device_set
        if memory is None or memory == device.default_memory().kind:
            return None
        return Sharding(shard_shape=shape, memory_kind=memory)
    try:
        shard = tuple(map(int, sharding.shard_shape(shape)))
    except (ValueError, TypeError, NotImplementedError):  # an axis that does not divide
        shard = shape
    if not isinstance(sharding, NamedSharding):
        return Sharding(shard_shape=shard, memory_kind=memory)
    axes: list[tuple[str, ...]] = []
    for entry in sharding.spec:
        names = entry if isinstance(entry, tuple) else (entry,)
        axes.append(tuple(name for name in names if isinstance(name, str)))
    axes += [()] * (len(shape) - len(axes))
    mesh = tuple((str(name), int(size)) for name, size in sharding.mesh.shape.items())
    return Sharding(mesh=mesh, spec=tuple(axes), shard_shape=shard, memory_kind=memory)


def _array_spec(value: Any, *, weak: bool = False, ref: bool = False, abstract: bool = False) -> ArraySpec:
    shape = tuple(value.shape)
    sharding = None if value.sharding is None else describe_sharding(value.sharding, shape)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl, bits = _key_impl(value.dtype)
        return ArraySpec(
            shape=shape,
            dtype=dtype_name(np.dtype(bits.dtype)),
            array_type="key",
            ref=ref,
            impl=impl,
            key_shape=tuple(bits.shape),
            sharding=sharding,
            abstract=abstract,
        )
    dtype = np.dtype(value.dtype)
    _check_dtype(dtype)
    return ArraySpec(
        shape=shape,
        dtype=dtype_name(dtype),
        weak_type=weak,
        ref=ref,
        sharding=sharding,
        abstract=abstract,
    )


def _key_impl(dtype: Any) -> tuple[str, jax.ShapeDtypeStruct]:
    """Name of a key dtype's implementation, and the bits of one key. JAX tells the name of arrays only."""
    names: list[Any] = []

    def look(key: jax.Array) -> jax.Array:
        names.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    bits = jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    (impl,) = names
    return impl if isinstance(impl, str) else str(getattr(impl, "name", impl)), bits


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind == "O":
        raise UnsavableError(
            "an object array holds arbitrary Python objects; make it a list, or give it a dtype"
        )
    if dtype.kind == "V" and issubclass(dtype.type, np.void):
        raise UnsavableError(
            f"an array of the structured dtype {dtype}; save its fields as separate arrays, such as in a dict"
        )
    if dtype.kind == "T":
        raise UnsavableError('an array of variable-width strings; use array.astype("U")')
    if dtype.type in (np.longdouble, np.clongdouble):
        raise UnsavableError(f"{dtype.name} differs between machines; use float64 or complex128")


def _jax_array(value: Any, target: bool) -> Kind:
    if not target and value.is_deleted():
        raise UnsavableError(
            "the array has been deleted (donated to a jitted function?); "
            "save the array that the function returned"
        )
    sharding = value.sharding
    signature = (value.aval, sharding)
    # A hit is the hot path: one look at each leaf of each save.
    kind = _known.get(signature)
    if kind is not None:
        return kind
    weak = bool(getattr(value, "weak_type", False))
    return _kind(signature, lambda: _array_spec(value, weak=weak), shares=True)


def _tracer(_value: Any, _target: bool) -> Kind:
    raise UnsavableError(
        "a tracer has no value: this runs inside jit, grad, vmap or the like. "
        "Call it outside of the transformed function, on its results"
    )


def _ref(value: Any, _target: bool) -> Kind:
    signature = ("ref", value.shape, value.dtype, value.sharding)
    return _kind(signature, lambda: _array_spec(value, ref=True), shares=True)


def _abstract(value: Any, target: bool) -> Kind:
    if not target:
        raise UnsavableError(
            "an abstract array (jax.ShapeDtypeStruct) has no values; save the arrays themselves"
        )
    weak, ref = bool(value.weak_type), bool(getattr(value, "is_ref", False))
    signature = ("abstract", value.shape, value.dtype, weak, ref, value.sharding)
    return _kind(signature, lambda: _array_spec(value, weak=weak, ref=ref, abstract=True))


def _numpy(value: Any, _target: bool) -> Kind:
    def make() -> ArraySpec:
        _check_dtype(value.dtype)
        return ArraySpec(shape=value.shape, dtype=dtype_name(value.dtype), array_type="numpy")

    return _kind(("numpy", value.shape, value.dtype), make, shares=True)


def _numpy_subclass(value: Any, _target: bool) -> Kind:
    if isinstance(value, np.ma.MaskedArray):
        raise UnsavableError("a masked array; save its .data and .mask as two arrays, or .filled(...)")
    raise UnsavableError(
        f"{_spell(type(value))} is a subclass of numpy.ndarray, whose meaning would be lost; "
        "use numpy.asarray(...) and save what it adds beside it"
    )


def _scalar(value: Any, _target: bool) -> Kind:
    def make() -> ArraySpec:
        _check_dtype(value.dtype)
        return ArraySpec(shape=(), dtype=dtype_name(value.dtype), array_type="scalar")

    return _kind(("scalar", value.dtype), make)


# ---- everything else ----


def _python(value: Any, _target: bool) -> Kind:
    cls = type(value)
    return _kind(("value", cls), lambda: ValueSpec(type=cast("Any", cls.__name__)), fill=True)


def _ellipsis(_value: Any, target: bool) -> Kind:
    if not target:
        raise UnsavableError(
            "`...` means 'not asked for' in the target of a restore; leave it out of what is saved"
        )
    return _kind("skipped", SkippedSpec)


def is_iterator(value: object) -> bool:
    """Whether an object has a state that can be taken and given back (grain's protocol, or PyTorch's)."""
    pairs = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
    return not isinstance(value, type) and any(
        callable(getattr(value, get, None)) and callable(getattr(value, put, None)) for get, put in pairs
    )


def iterator_state(value: Any) -> object:
    """The state of an iterator, by one call."""
    return value.get_state() if callable(getattr(value, "get_state", None)) else value.state_dict()


def _iterator(_value: Any, _target: bool) -> Kind:
    return _kind("iterator", IteratorSpec, shares=True, fill=True)


class MissingFunction:
    """Stands for a function of a checkpoint that was opened without the program. Calling it raises."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_args: object, **_kwargs: object) -> object:
        """Raises: a checkpoint holds the name of a function only."""
        raise RuntimeError(
            f"{self.name} is not part of the checkpoint, only its name is; restore into a target that has it"
        )

    def __repr__(self) -> str:
        return f"<missing function {self.name}>"


def callable_name(value: Any) -> str:
    """The qualified name of a callable: the same in every process, so no address and no repr."""
    if isinstance(value, MissingFunction):
        return value.name
    if isinstance(value, functools.partial):
        return f"functools.partial({callable_name(value.func)})"
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(name, str):
        inner = getattr(value, "__wrapped__", None)
        return _spell(type(value)) if inner is None else callable_name(inner)
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else name


def _callable(value: Any, _target: bool) -> Kind:
    name = callable_name(value)
    return _kind(("callable", name), lambda: CallableSpec(name=name))


def _spell(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


_REMEDIES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((enum.Enum,), "save its .value (the class would be lost)"),
    ((set, frozenset), "make it a sorted list or tuple"),
    (
        (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType),
        "use an iterator with get_state and set_state",
    ),
    ((io.IOBase,), "save its path and position, and open it again"),
    ((np.random.Generator,), "save generator.bit_generator.state, a dict"),
    ((np.random.BitGenerator,), "save its .state, a dict"),
    ((random.Random,), "save its .getstate()"),
    ((bytearray, memoryview), "make it bytes"),
    ((range,), "make it a list, or save start, stop and step"),
    (
        (datetime.date, datetime.time, datetime.timedelta),
        "use .isoformat(), or numpy.datetime64 or timedelta64",
    ),
    ((decimal.Decimal, fractions.Fraction, os.PathLike), "use str(...)"),
    ((bool, int, float, complex, str, bytes), "its type would be lost: convert it to the plain Python type"),
    (
        (dict, list, tuple, Mapping),
        "jax does not know it as a container: register it as a pytree, or convert it",
    ),
)


def _unsavable(value: Any, _target: bool) -> Kind:
    cls = type(value)
    remedy = next((text for classes, text in _REMEDIES if isinstance(value, classes)), None)
    if remedy is None and hasattr(cls, "__dataclass_fields__"):
        remedy = "register the class with jax.tree_util.register_dataclass"
    if remedy is None and isinstance(value, Iterator):
        remedy = "give it get_state and set_state"
    if remedy is None and hasattr(value, "__array__"):
        remedy = "convert it with numpy.asarray(...)"
    remedy = remedy or "register its class as a pytree, give it get_state and set_state, or leave it out"
    article = "an" if _spell(cls)[0].lower() in "aeiou" else "a"
    raise UnsavableError(f"{article} {_spell(cls)} cannot be saved; {remedy}")


_PLAIN = (bool, int, float, complex, str, bytes)
_Handler = Callable[[Any, bool], Kind]


def _handler(value: object) -> _Handler:
    """Which of the above an object is for; the first that fits."""
    rules: tuple[tuple[bool, _Handler], ...] = (
        (isinstance(value, Tracer), _tracer),
        (isinstance(value, jax.Array), _jax_array),
        (isinstance(value, jax.Ref), _ref),
        (isinstance(value, jax.ShapeDtypeStruct), _abstract),
        (isinstance(value, np.generic), _scalar),
        (type(value) in (np.ndarray, np.memmap), _numpy),
        (isinstance(value, np.ndarray), _numpy_subclass),
        (type(value) in _PLAIN, _python),
        (value is ..., _ellipsis),
        (isinstance(value, (enum.Enum, *_PLAIN)), _unsavable),
        (is_iterator(value), _iterator),
        (callable(value), _callable),
    )
    return next((handler for fits, handler in rules if fits), _unsavable)


_LASTING = frozenset((_jax_array, _ref, _abstract, _scalar, _numpy, _python, _tracer))
_HANDLERS: dict[type, _Handler] = {}
