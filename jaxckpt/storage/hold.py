"""Holding values on the host so that nothing the program does later can change them.

The buffer that ``np.asarray`` shows of an array on a CPU is kept alive by that view: JAX then
declines to reuse it for a donation, and deleting the array does not free it. What lies on several
devices is put together shard by shard, without a program on the devices.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from functools import lru_cache
from itertools import compress
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Struct

from jaxckpt.errors import UnsupportedLeafError
from jaxckpt.storage.format.dtypes import element_bits, mask_sub_byte
from jaxckpt.storage.own_thread import in_own_thread, plain_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


#: Values of an array: what shows its shape, `nbytes` and `tobytes()`.
Buffer = np.ndarray[Any, Any] | memoryview


class Held(Struct, frozen=True, kw_only=True):
    """Values on the host.

    Attributes:
        buffers: one for each value, C-contiguous, with the shape and dtype that are stored: of typed
            PRNG keys the bits; values of less than a byte take a byte each, high bits zero.
        nbytes: bytes that had to be copied; the rest is memory that the values lay in.
    """

    buffers: tuple[Buffer | Borrowed, ...]
    nbytes: int

    @property
    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """`buffers` as numpy's arrays."""
        return tuple(map(np.asarray, self.buffers))


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


def hold_all(
    values: Sequence[object], shows: Sequence[Callable[[Any], Any] | None] = (), *, copy: bool = False
) -> Held:
    """`hold` for many values: transfers from accelerators overlap.

    Args:
        values: as of `hold`.
        shows: for each what shows its memory, where that is known (`leaves.Kind`).
        copy: as of `hold`.

    Raises:
        UnsupportedLeafError: as `hold` does.
    """
    with plain_settings():
        held: list[Any] = _shown(values, shows) if shows and not copy else [None] * len(values)
        rest = [(index, Transfer(values[index])) for index, shown in enumerate(held) if shown is None]
        for _, transfer in rest:
            transfer.start()
        nbytes = 0
        for index, transfer in rest:
            held[index], copied = transfer.finish(copy=copy)
            if copied:
                nbytes += held[index].nbytes
    return Held(buffers=tuple(held), nbytes=nbytes)


def borrow_all(values: Sequence[object], shows: Sequence[Callable[[Any], Any] | None]) -> Held:
    """Like `hold_all`, but copies nothing: the values must stay as they are until they have been taken.

    Returns:
        `Held.buffers` has a `Borrowed` for each value that lies in no memory of JAX's on the host.
    """
    with plain_settings():
        shown = _shown(values, shows)
    buffers = [Borrowed(value) if view is None else view for value, view in zip(values, shown, strict=True)]
    return Held(buffers=tuple(buffers), nbytes=0)


class Borrowed:
    """A value that is brought to the host when it is written.

    Attributes:
        nbytes: of the value.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._transfer: Transfer | None = None
        self.nbytes: int = value.size * value.dtype.itemsize

    def start(self) -> None:
        """Begins to bring it; the memory is taken from now on."""
        if self._transfer is None:
            with plain_settings():
                self._transfer = Transfer(self._value)
                self._transfer.start()

    def take(self) -> tuple[np.ndarray[Any, Any], bool]:
        """The values, as of `Held.buffers`, and whether they are a copy; once."""
        self.start()
        transfer, self._transfer, self._value = self._transfer, None, None
        assert transfer is not None
        with plain_settings():
            return transfer.finish(copy=False, own=False)


def take_in_order(
    buffers: Sequence[Buffer | Borrowed], order: Sequence[int], ahead: int
) -> Iterator[tuple[int, Buffer, bool]]:
    """The buffers in that order, and whether each takes memory that it did not take before.

    Borrowed ones are brought to the host as they are asked for, and up to `ahead` bytes before that.
    """
    coming = deque(buffer for i in order if isinstance(buffer := buffers[i], Borrowed))
    held = 0
    for i in order:
        buffer = buffers[i]
        if not isinstance(buffer, Borrowed):
            yield i, buffer, False
            continue
        while coming and (not held or held + coming[0].nbytes <= ahead):
            held += coming[0].nbytes
            coming.popleft().start()
        array, copied = buffer.take()
        yield i, array, copied
        held -= buffer.nbytes


def hold_on_devices(values: Sequence[Any], shows: Sequence[Callable[[Any], Any] | None]) -> Held:
    """Like `hold_all`, but arrays of an accelerator are copied there, and brought to the host when written.

    The devices make the copies before anything that the program gives them next. If they have no room for
    all of them, this is `hold_all`.
    """
    away = [
        show is None and isinstance(value, jax.Array) and not on_cpu(value.sharding)
        for value, show in zip(values, shows, strict=True)
    ]
    copies = _copies_on_devices(list(compress(values, away)))
    if not copies:
        return hold_all(values, shows)
    here = [not each for each in away]
    held = hold_all(list(compress(values, here)), list(compress(shows, here)))
    borrowed, rest = map(Borrowed, copies), iter(held.buffers)
    return Held(buffers=tuple(next(borrowed) if each else next(rest) for each in away), nbytes=held.nbytes)


def _copies_on_devices(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    if not arrays or any(array.is_deleted() for array in arrays) or not _have_room(arrays):
        return []
    with plain_settings():
        try:
            return jax.device_put(list(arrays), [array.sharding for array in arrays], may_alias=False)
        except RuntimeError:  # no room after all: the free memory is in pieces
            return []


def _have_room(arrays: Sequence[jax.Array]) -> bool:
    """Whether each device has free memory for what these arrays have there."""
    wanted: Counter[Any] = Counter()
    for array in arrays:
        nbytes = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        wanted.update(dict.fromkeys(array.sharding.addressable_devices, nbytes))
    for device, nbytes in wanted.items():
        stats = device.memory_stats()
        if stats and stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) < nbytes:
            return False
    return True


def _shown(values: Sequence[object], shows: Sequence[Callable[[Any], Buffer] | None]) -> list[Buffer | None]:
    """Views of the arrays in host memory, in 2 us each: what a training step waits for. None for all else."""
    found: list[Buffer | None] = [None] * len(values)
    ways = set(shows)
    for show in ways - {None}:
        if len(ways) == 1:
            return _show_all(values, show)
        where = [index for index, each in enumerate(shows) if each is show]
        views = _show_all([values[index] for index in where], show)
        for index, view in zip(where, views, strict=True):
            found[index] = view
    return found


def _show_all(values: Sequence[object], show: Any) -> list[Buffer | None]:
    try:
        views = [show(value) for value in values]
    except (BufferError, RuntimeError):
        return [_show(value, show) for value in values]
    flags = views if show is memoryview else [view.flags for view in views]
    if False in [each.c_contiguous for each in flags]:
        return [_show(value, show) for value in values]
    return views


def _show(value: object, show: Callable[[Any], Buffer]) -> Buffer | None:
    try:
        view = show(value)
    except (BufferError, RuntimeError):  # of another layout; deleted or failed: told about later
        return None
    return view if np.asarray(view).flags.c_contiguous else None


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


class Transfer:
    """A value on its way to the host.

    Raises:
        UnsupportedLeafError: see `hold`.
    """

    def __init__(self, value: Any) -> None:
        value = _bits(value)
        if not isinstance(value, jax.Array | np.ndarray | np.generic):
            raise UnsupportedLeafError(f"a {type(value).__name__} is no array")
        self._value: Any = value
        self._parts: list[tuple[Any, tuple[slice, ...]]] = []
        if not isinstance(value, jax.Array):
            return
        if value.is_deleted():
            raise UnsupportedLeafError(
                f"this array of shape {value.shape} is deleted (donated to a jitted function?): "
                "save what that function returned"
            )
        if value.sharding.num_devices == 1 or value.is_fully_replicated:
            self._parts = [(_apart(value.addressable_data(0)), ())]
            return
        if not value.is_fully_addressable:
            raise UnsupportedLeafError(
                f"only a part of this array of shape {value.shape} is on the devices of process "
                f"{jax.process_index()}"
            )
        shards = value.addressable_shards
        places = _distinct(value.sharding, value.shape)
        self._parts = [(_apart(shards[position].data), place) for position, place in places]

    def start(self) -> None:
        """Begins it, where the value is not in host memory already; others can begin meanwhile."""
        if self._parts and not on_cpu(self._value.sharding):
            for part, _ in self._parts:
                part.copy_to_host_async()

    def finish(self, *, copy: bool, own: bool = True) -> tuple[np.ndarray[Any, Any], bool]:
        """The host array, and whether it is a copy.

        Args:
            copy: see `hold`.
            own: whether numpy's arrays are copied, which their owner can write to.
        """
        if not self._parts:
            host = np.array(self._value, order="C", copy=True if own else None, subok=False)
        elif self._parts[0][1] == ():
            host = np.asarray(self._parts[0][0])
        else:
            host = np.empty(self._value.shape, self._value.dtype)
            for part, place in self._parts:
                host[place] = np.asarray(part)
        if _is_sub_byte(host.dtype):
            host = mask_sub_byte(host).copy()
        if not host.flags.c_contiguous or (copy and not host.flags.owndata):
            return np.array(host, order="C", copy=True), True
        mine = host.flags.owndata and host is not self._value
        return host, mine or not on_host(self._value)


def on_host(value: Any) -> bool:
    return not isinstance(value, jax.Array) or on_cpu(value.sharding)


def _apart(part: jax.Array) -> jax.Array:
    """The same array as another object: what JAX keeps of it on the host then ends with that one."""
    return jax.make_array_from_single_device_arrays(part.shape, part.sharding, [part])


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
