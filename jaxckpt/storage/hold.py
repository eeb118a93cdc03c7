"""Holding values on the host so that nothing the program does later can change them.

The buffer that ``np.asarray`` shows of an array on a CPU is kept alive by that view: JAX then
declines to reuse it for a donation, and deleting the array does not free it. What lies on several
devices is put together shard by shard, without a program on the devices.
"""

from __future__ import annotations

import contextlib
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Struct

from jaxckpt.errors import UnsupportedLeafError
from jaxckpt.storage.format.dtypes import element_bits, mask_sub_byte

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

_T = TypeVar("_T")


class Held(Struct, frozen=True, kw_only=True):
    """Values on the host.

    Attributes:
        arrays: one for each value, C-contiguous, with the shape and dtype that are stored: of typed
            PRNG keys the bits; values of less than a byte take a byte each, high bits zero.
        nbytes: bytes that had to be copied; the rest is memory that the values lay in.
    """

    arrays: tuple[np.ndarray[Any, Any], ...]
    nbytes: int


def hold(value: object, *, copy: bool = False) -> np.ndarray[Any, Any]:
    """A host array with the value's bytes, which donation, deletion and writes in place do not reach.

    Args:
        value: a `jax.Array` (also a typed PRNG key array, sharded or not), a `jax.Ref`, an ndarray or
            a numpy scalar.
        copy: copy also what could be shown in place: an array that JAX made over the caller's own
            numpy memory changes when that is written to.

    Returns:
        An array as in `Held.arrays`; read-only where it shows the value's own memory.

    Raises:
        UnsupportedLeafError: the array is deleted, or not all of it is on this process's devices.
    """
    return hold_all([value], copy=copy).arrays[0]


def hold_all(values: Sequence[object], *, copy: bool = False) -> Held:
    """`hold` for many values: transfers from accelerators overlap.

    Raises:
        UnsupportedLeafError: as `hold` does.
    """
    with plain_settings():
        arrays = [None] * len(values) if copy else _shown_in_place(values)
        rest = [(index, _bits(values[index])) for index, array in enumerate(arrays) if array is None]
        for _, array in rest:
            if isinstance(array, jax.Array) and not on_cpu(array.sharding):
                _start_transfer(array)
        nbytes = 0
        held: list[Any] = arrays
        for index, array in rest:
            held[index], copied = _hold_array(array, copy=copy)
            if copied:
                nbytes += held[index].nbytes
    return Held(arrays=tuple(held), nbytes=nbytes)


def _shown_in_place(values: Sequence[Any]) -> list[np.ndarray[Any, Any] | None]:
    """Views of the plain arrays on one CPU device, which most are; None for all else.

    Written for speed: this is what a training step waits for (4 us an array, nearly all in numpy).
    """
    found: list[np.ndarray[Any, Any] | None] = []
    plain_types: dict[type, bool] = {}
    in_place: dict[int, bool] = {}  # by identity, as long as `values` keeps the shardings alive
    for value in values:
        cls = type(value)
        plain = plain_types.get(cls)
        if plain is None:
            plain = plain_types[cls] = isinstance(value, jax.Array) and not is_key(value.dtype)
        view = None
        if plain:
            sharding = value.sharding
            show = in_place.get(id(sharding))
            if show is None:
                show = in_place[id(sharding)] = sharding.num_devices == 1 and on_cpu(sharding)
            if show and not value.is_deleted():
                view = np.asarray(value)
                if (view.itemsize == 1 and _is_sub_byte(view.dtype)) or not view.flags.c_contiguous:
                    view = None
        found.append(view)
    return found


@contextlib.contextmanager
def plain_settings() -> Generator[None]:
    """None of the settings that would refuse to show or make a value, or change it."""
    with (
        jax.enable_x64(
            True
        ),  # 64-bit values stay what they are: the caller has decided whether there may be any
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.debug_key_reuse(False),
    ):
        yield


def in_own_thread(work: Callable[[], _T]) -> _T:
    """The result of `work` in a thread without an active mesh, default device or trace, in plain settings."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with plain_settings():
                results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="jaxckpt-devices")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@lru_cache(maxsize=256)
def is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


@lru_cache(maxsize=256)
def _is_sub_byte(dtype: np.dtype[Any]) -> bool:
    return element_bits(dtype.name) is not None


def _bits(value: Any) -> Any:
    """The array itself, of keys their bits, of a Ref a copy of its contents. Only a Ref's runs a program."""
    if isinstance(value, jax.Ref):
        # the read obeys an active mesh, and may show the Ref's own buffer, which the next write changes
        return in_own_thread(lambda: np.array(_bits(value[...])))
    return jax.random.key_data(value) if isinstance(value, jax.Array) and is_key(value.dtype) else value


def _hold_array(array: Any, *, copy: bool) -> tuple[np.ndarray[Any, Any], bool]:
    """The host array, and whether it is a copy."""
    if isinstance(array, jax.Array):
        held = _of_jax(array)
    elif isinstance(array, np.ndarray | np.generic):
        held = np.array(array, order="C", copy=True, subok=False)
    else:
        raise UnsupportedLeafError(f"a {type(array).__name__} is no array")
    if _is_sub_byte(held.dtype):
        held = mask_sub_byte(held).copy()
    flags = held.flags
    if not flags.c_contiguous or (copy and not flags.owndata):
        return np.array(held, order="C", copy=True), True
    return held, flags.owndata


def _of_jax(array: jax.Array) -> np.ndarray[Any, Any]:
    sharding = array.sharding
    single = sharding.num_devices == 1
    if array.is_deleted():
        raise UnsupportedLeafError(
            f"this array of shape {array.shape} is deleted (donated to a jitted function?): "
            "save what that function returned"
        )
    if single and on_cpu(sharding):
        return np.asarray(array)  # shows the buffer and keeps nothing in the array
    if single or array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if not array.is_fully_addressable:
        raise UnsupportedLeafError(
            f"only a part of this array of shape {array.shape} is on the devices of process "
            f"{jax.process_index()}"
        )
    whole = np.empty(array.shape, array.dtype)
    shards = array.addressable_shards
    for position, index in _distinct(sharding, array.shape):
        whole[index] = np.asarray(shards[position].data)
    return whole


@lru_cache(maxsize=4096)
def _distinct(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[tuple[int, tuple[slice, ...]]]:
    """One shard for each part of the array: its number among the addressable ones and its place."""
    found: dict[tuple[tuple[int | None, int | None], ...], tuple[int, tuple[slice, ...]]] = {}
    places = sharding.addressable_devices_indices_map(shape)
    for position, index in enumerate(places.values()):
        place = tuple(index or ())
        found.setdefault(tuple((part.start, part.stop) for part in place), (position, place))
    return list(found.values())


@lru_cache(maxsize=4096)
def on_cpu(sharding: jax.sharding.Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def _start_transfer(array: jax.Array) -> None:
    if array.is_deleted():
        return  # told about later
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            shard.data.copy_to_host_async()
