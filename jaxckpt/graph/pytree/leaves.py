"""What one leaf is: values to specs, and what cannot be saved to a reason and a remedy."""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding
from msgspec import Struct

from jaxckpt.graph.model import (
    ArraySpec,
    CallableSpec,
    IteratorSpec,
    LeafSpec,
    SkippedSpec,
    ValueSpec,
)
from jaxckpt.graph.pytree.functions import callable_name
from jaxckpt.graph.pytree.shardings import describe_sharding
from jaxckpt.graph.pytree.unsavable import UnsavableError, spell, unsavable

# Those of Python's buffer protocol that JAX has.
_BUFFER_DTYPES = frozenset(np.dtype(code) for code in "?bBhHiIqQefdFD")
#: More kinds of leaf than this are not remembered: shapes that change with every save must not pile up.
_MAX_KNOWN = 65_536


class Kind(Struct, frozen=True):
    """What can be said of a leaf without its identity, kept once for all leaves like it.

    Attributes:
        spec: its spec; for Python values and iterators without the value.
        token: equal for leaves of an equal kind, never used again for another.
        shares: whether the same object at two positions is one node.
        fill: whether the spec still wants the value.
        show: of a `jax.Array` in host memory what gives a view of it: `memoryview` where Python's buffer
            protocol has the dtype, which takes a fifth of the time, else `numpy.asarray`.
        nbytes: of an array.
    """

    spec: LeafSpec
    token: int
    shares: bool = False
    fill: bool = False
    show: Callable[[Any], Any] | None = None
    nbytes: int = 0


_tokens = itertools.count()
_known: dict[object, Kind] = {}


def _kind(
    signature: object,
    make: Callable[[], LeafSpec],
    *,
    shares: bool = False,
    fill: bool = False,
    show: Callable[[Any], Any] | None = None,
    nbytes: int = 0,
) -> Kind:
    kind = _known.get(signature)
    if kind is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()  # tokens are not reused, so graphs remembered under the old ones are merely lost
        kind = _known[signature] = Kind(make(), next(_tokens), shares, fill, show, nbytes)
    return kind


def classify_all(values: Sequence[object], *, target: bool) -> tuple[list[Kind], dict[int, str]]:
    """The kind of each leaf, and by index why one cannot be saved.

    This is what a training step waits for, hence no loop where one of the interpreter's own will do: most
    leaves are arrays, and most arrays are like one that was seen before.
    """
    kinds = _known_kinds(values, target=target)
    failed: dict[int, str] = {}
    for index in [index for index, kind in enumerate(kinds) if kind is None]:
        try:
            kinds[index] = classify(values[index], target=target)
        except UnsavableError as error:
            failed[index] = str(error)
            kinds[index] = Kind(SkippedSpec(), -1)
    return cast("list[Kind]", kinds), failed


def _known_kinds(values: Sequence[object], *, target: bool) -> list[Kind | None]:
    """The kinds of the arrays of which one like them was seen before; None for all else."""
    nothing: list[Kind | None] = [None] * len(values)
    classes = list(map(type, values))
    of_arrays = {cls for cls in set(classes) if _HANDLERS.get(cls) is _device_array}
    if not of_arrays:
        return nothing
    where = None
    arrays: Sequence[Any] = values
    if len(of_arrays) < len(set(classes)):
        where = [index for index, cls in enumerate(classes) if cls in of_arrays]
        arrays = [values[index] for index in where]
    if not target and True in [array.is_deleted() for array in arrays]:
        return nothing
    kinds = _kinds_of_arrays([array.aval for array in arrays], [array.sharding for array in arrays])
    if where is None:
        return kinds
    for index, kind in zip(where, kinds, strict=True):
        nothing[index] = kind
    return nothing


def _kinds_of_arrays(avals: Sequence[Any], shardings: Sequence[Any]) -> list[Kind | None]:
    places = shardings
    if _only_cpus() and set(map(type, shardings)) == {SingleDeviceSharding}:
        places = [sharding.memory_kind for sharding in shardings]  # see `_signature`
    # By the identity of the aval, which most arrays of a kind share: comparing them takes long.
    keys: list[Any] = list(map(id, avals))
    if len(set(places)) > 1:
        keys = list(zip(keys, places, strict=True))
    first = dict(zip(keys, range(len(keys)), strict=True))
    kinds = {key: _known.get((avals[index], places[index])) for key, index in first.items()}
    return [kinds[key] for key in keys]


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


def _array_spec(value: Any, *, ref: bool = False, abstract: bool = False) -> ArraySpec:
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
        weak_type=not isinstance(value, jax.Ref) and bool(getattr(value, "weak_type", False)),
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


def _device_array(value: Any, target: bool) -> Kind:
    """A `jax.Array` that is a plain array of a device, or of several."""
    _check_alive(value, target)
    return _kind(
        _signature(value),
        lambda: _array_spec(value),
        shares=True,
        show=_how_to_show(value),
        nbytes=value.nbytes,
    )


def _other_array(value: Any, target: bool) -> Kind:
    """A `jax.Array` of a class of its own: typed PRNG keys."""
    _check_alive(value, target)
    return _kind((value.aval, value.sharding), lambda: _array_spec(value), shares=True, nbytes=value.nbytes)


def _check_alive(value: Any, target: bool) -> None:
    if not target and value.is_deleted():
        raise UnsavableError(
            "the array has been deleted (donated to a jitted function?); "
            "save the array that the function returned"
        )


def _how_to_show(value: Any) -> Callable[[Any], Any] | None:
    sharding = value.sharding
    if type(sharding) is not SingleDeviceSharding or next(iter(sharding.device_set)).platform != "cpu":
        return None
    if value.dtype in _BUFFER_DTYPES:
        return memoryview
    # (of values of less than a byte numpy shows a copy)
    return np.asarray if value.dtype.name.startswith(("bfloat16", "float8")) else None


def _signature(value: Any) -> object:
    """All that the kind of an array depends on.

    Comparing the shardings of single devices takes as long as all the rest, so where there are only CPUs, of
    which one is as good as another here, that is left out.
    """
    sharding = value.sharding
    if type(sharding) is SingleDeviceSharding and _only_cpus():
        return value.aval, sharding.memory_kind
    return value.aval, sharding


@functools.cache
def _only_cpus() -> bool:
    """Whether JAX has no accelerator: one that it has is its default, unless the platforms are given."""
    config: Any = jax.config
    return jax.default_backend() == "cpu" and config.jax_platforms in (None, "", "cpu")


def _tracer(_value: Any, _target: bool) -> Kind:
    raise UnsavableError(
        "a tracer has no value: this runs inside jit, grad, vmap or the like. "
        "Call it outside of the transformed function, on its results"
    )


def _ref(value: Any, _target: bool) -> Kind:
    signature = ("ref", value.shape, value.dtype, value.sharding)
    nbytes = value.size * value.dtype.itemsize
    return _kind(signature, lambda: _array_spec(value, ref=True), shares=True, nbytes=nbytes)


def _abstract(value: Any, target: bool) -> Kind:
    if not target:
        raise UnsavableError(
            "an abstract array (jax.ShapeDtypeStruct) has no values; save the arrays themselves"
        )
    weak, ref = bool(value.weak_type), bool(getattr(value, "is_ref", False))
    signature = ("abstract", value.shape, value.dtype, weak, ref, value.sharding)
    return _kind(signature, lambda: _array_spec(value, ref=ref, abstract=True))


def _numpy(value: Any, _target: bool) -> Kind:
    def make() -> ArraySpec:
        _check_dtype(value.dtype)
        return ArraySpec(shape=value.shape, dtype=dtype_name(value.dtype), array_type="numpy")

    return _kind(("numpy", value.shape, value.dtype), make, shares=True, nbytes=value.nbytes)


def _numpy_subclass(value: Any, _target: bool) -> Kind:
    if isinstance(value, np.ma.MaskedArray):
        raise UnsavableError("a masked array; save its .data and .mask as two arrays, or .filled(...)")
    raise UnsavableError(
        f"{spell(type(value))} is a subclass of numpy.ndarray, whose meaning would be lost; "
        "use numpy.asarray(...) and save what it adds beside it"
    )


def _scalar(value: Any, _target: bool) -> Kind:
    def make() -> ArraySpec:
        _check_dtype(value.dtype)
        return ArraySpec(shape=(), dtype=dtype_name(value.dtype), array_type="scalar")

    return _kind(("scalar", value.dtype), make, nbytes=value.nbytes)


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


def _callable(value: Any, _target: bool) -> Kind:
    name = callable_name(value)
    return _kind(("callable", name), lambda: CallableSpec(name=name))


def _unsavable(value: Any, _target: bool) -> Kind:
    raise unsavable(value)


_PLAIN = (bool, int, float, complex, str, bytes)
_Handler = Callable[[Any, bool], Kind]


def _handler(value: object) -> _Handler:
    """Which of the above an object is for; the first that fits."""
    rules: tuple[tuple[bool, _Handler], ...] = (
        (isinstance(value, Tracer), _tracer),
        (
            isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended),
            _device_array,
        ),
        (isinstance(value, jax.Array), _other_array),
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


_LASTING = frozenset((_device_array, _other_array, _ref, _abstract, _scalar, _numpy, _python, _tracer))
_HANDLERS: dict[type, _Handler] = {}
