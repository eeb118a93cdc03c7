"""Arrays to read into: made without values, and filled before anybody has seen them.

On a CPU the memory of a `jax.Array` is the host's, so that a value can be read from the disk right into
memory that XLA owns: no copy, no buffer beside the result, and the result can be donated. (Memory that was
ours and that JAX was shown cannot be.) A program without arguments makes such arrays; as it takes 15 to 20 ms
to compile, this is only done where it pays.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from msgspec import Struct

from jaxckpt.storage.format.dtypes import element_bits, numpy_dtype
from jaxckpt.storage.hold import on_cpu
from jaxckpt.storage.own_thread import in_own_thread
from jaxckpt.storage.place import destination, is_default_memory, layout
from jaxckpt.storage.process import was_forked
from jaxckpt.storage.uninitialized import available, uninitialized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jaxckpt.graph.model import ArraySpec

# A program makes at most this many arrays.
_GROUP = 64
# Small arrays of one kind are made so many at a time, 3 us each; one that is copied takes 40 to 80.
_SMALL_BYTES = 128 << 10
_LEAST = 512
# A copy takes 0.2 s for a GiB, and memory.
_LEAST_BYTES = 128 << 20


class Blank(Struct, frozen=True):
    """An array whose values are still to be written.

    Attributes:
        array: the array, complete but for its values, which nothing may read before they are there.
        memory: its memory, C-ordered; keeps the array alive, as does what is made of it.
    """

    array: jax.Array
    memory: ctypes.Array[ctypes.c_char]


class _Place(NamedTuple):
    """One CPU: what an array is committed to, or the device of an uncommitted one (None: the default)."""

    to: SingleDeviceSharding | None
    device: Any


class _Form(NamedTuple):
    """What an array is."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


#: Indices of what is asked for.
_Members = dict[_Form, list[int]]


def blanks(specs: Sequence[ArraySpec], likes: Sequence[Any], large: int) -> list[Blank | None]:
    """For each array of a target one to read it into, or None where it is better copied.

    Args:
        specs: as of `place.Placement`.
        likes: the same.
        large: bytes of an array that is too large to be copied.

    Returns:
        Arrays that `place` would have made of the same, but for the values.
    """
    results: list[Blank | None] = [None] * len(specs)
    if was_forked():
        return results  # `place` says what to do
    places: defaultdict[_Place, _Members] = defaultdict(lambda: defaultdict(list))
    # By identity, which is cheap, and kept by what is kept beside: specs and shardings of a tree are few.
    known: dict[tuple[int, int, bool], tuple[list[int] | None, Any]] = {}
    for index, (spec, like) in enumerate(zip(specs, likes, strict=True)):
        if len(spec.shape) > 1 and layout(like) is not None:
            continue
        sharding = getattr(like, "sharding", None)
        kind = (id(spec), id(sharding), getattr(like, "committed", True))
        if kind not in known:
            place = _place(spec, like)
            alike = None if place is None else places[place][_Form(spec.shape, numpy_dtype(spec.dtype))]
            known[kind] = alike, (spec, sharding)
        members = known[kind][0]
        if members is not None:
            members.append(index)
    wanted = {place: _worthwhile(members, large) for place, members in places.items()}
    if any(wanted.values()) and available():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # then they are copied
            in_own_thread(lambda: [_make(place, members, results) for place, members in wanted.items()])
    return results


def _place(spec: ArraySpec, like: Any) -> _Place | None:
    """Where an array is to be made; None if it is none that can be, a plain one in the memory of one CPU."""
    if spec.array_type != "jax" or spec.weak_type or spec.ref or 0 in spec.shape:
        return None
    if element_bits(spec.dtype) is not None:
        return None
    to, device = destination(like)
    if to is None:
        if isinstance(device, str):
            device = jax.local_devices(backend=device)[0]
        where = jax.local_devices()[0] if device is None else device
        return _Place(None, device) if getattr(where, "platform", None) == "cpu" else None
    if not isinstance(to, SingleDeviceSharding) or not on_cpu(to) or not is_default_memory(to):
        return None
    return _Place(to, None)


def _worthwhile(members: _Members, large: int) -> _Members:
    """Those that are not better copied."""
    most = sum([form.nbytes * len(found) for form, found in members.items() if form.nbytes > _SMALL_BYTES])
    pays = most >= _LEAST_BYTES
    return {
        form: found
        for form, found in members.items()
        if form.nbytes >= large or (len(found) >= _LEAST if form.nbytes <= _SMALL_BYTES else pays)
    }


def _make(place: _Place, members: _Members, results: list[Blank | None]) -> None:
    made: dict[_Form, list[jax.Array]] = {form: [] for form in members}
    # an uncommitted array goes to the default device
    with contextlib.nullcontext() if place.device is None else jax.default_device(place.device):
        for forms, count in _programs({form: len(found) for form, found in members.items()}):
            program = _program(forms, place.to)
            runs = [program() for _ in range(count)]
            for form, arrays in zip(forms, zip(*runs, strict=True), strict=True):
                made[form] += arrays
    addresses: set[int] = set()
    for form, found in members.items():
        memory = ctypes.c_char * form.nbytes
        arrays = made[form][: len(found)]  # of small ones there may be more
        jax.block_until_ready(arrays)  # pyright: ignore[reportUnknownMemberType]
        for index, array in zip(found, arrays, strict=True):
            address = array.unsafe_buffer_pointer()
            addresses.add(address)
            part: Any = memory.from_address(address)
            part.array = array
            results[index] = Blank(array, part)
    if len(addresses) != sum(map(len, members.values())):  # one for two: XLA has never done so
        results[:] = [None] * len(results)


def _programs(counts: Mapping[_Form, int]) -> Iterator[tuple[tuple[_Form, ...], int]]:
    """What each program makes, and how often it runs: few programs, since to compile one takes long."""
    left: dict[_Form, int] = {}
    for form, count in counts.items():
        if form.nbytes <= _SMALL_BYTES:
            yield (form,) * _GROUP, -(-count // _GROUP)
        else:
            left[form] = count
    while left:
        times, forms = min(left.values()), list(left)
        for start in range(0, len(forms), _GROUP):
            yield tuple(forms[start : start + _GROUP]), times
        left = {form: count - times for form, count in left.items() if count > times}


@lru_cache(maxsize=64)
def _program(
    forms: tuple[_Form, ...], to: SingleDeviceSharding | None
) -> Callable[[], tuple[jax.Array, ...]]:
    def restored() -> tuple[jax.Array, ...]:
        return uninitialized(forms)

    return jax.jit(restored, out_shardings=None if to is None else (to,) * len(forms))
