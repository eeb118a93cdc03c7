"""Making values for a restored tree: device arrays that `jax.jit` cannot tell from the target's.

JAX objects are made in a thread of our own with settings of its own: an active mesh, `jax.disable_jit`,
`jax.debug_nans`, a transfer guard and `jax.enable_x64` are the calling thread's and would change what
comes out, or refuse it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt.errors import RestoreError
from jaxckpt.storage.hold import is_key, on_cpu
from jaxckpt.storage.own_thread import in_own_thread
from jaxckpt.storage.process import was_forked
from jaxckpt.storage.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxckpt.graph.model import ArraySpec

# Small arrays of one kind on one device are made this many at a time by an identity program: 10 us each, for
# 85 by `device_put`. The number is fixed, so that few programs are compiled (15 ms each), and fewer arrays
# than `_LEAST` do not repay that.
_GROUP = 64
_LEAST = 256
_SMALL_BYTES = 128 << 10
# XLA refuses programs with these types; `device_put` can move them.
_NO_PROGRAMS = frozenset(("int1", "uint1", "float6_e2m3fn", "float6_e3m2fn"))
# What a Python number of each kind becomes is weakly typed, of one of these dtypes.
_WEAK = {"float32": 0.0, "float64": 0.0, "int32": 0, "int64": 0, "complex64": 0j, "complex128": 0j}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A value to make.

    Attributes:
        host: the stored values, of the dtype of the result (of keys the bits); may be reused for something
            else when `place` has returned.
        spec: what the result is: array type, weak type, PRNG implementation, whether in a `jax.Ref`.
        like: the target's leaf: a `jax.Array` (deleted ones too), `jax.Ref`, `jax.ShapeDtypeStruct`, or
            None for an array on the default device.
        sharding: where it goes instead of where `like` says: a `Sharding` or a `Format`.
        owned: `host` was made for this placement alone, so that it may be the result where numpy is asked.
    """

    host: np.ndarray[Any, Any]
    spec: ArraySpec
    like: object | None = None
    sharding: Any = None
    owned: bool = False


def place(placements: Sequence[Placement]) -> list[Any]:
    """Makes the values, all complete when this returns.

    Returns:
        For each placement by `spec.array_type`: "numpy" a writable ndarray with memory of its own;
        "scalar" a numpy scalar; "jax" a `jax.Array` and "key" a typed PRNG key array, with the sharding,
        memory kind, layout and weak type of the target, committed to its devices only where the target
        is, in memory that can be donated; a new `jax.Ref` of that where `spec.ref`.

    Raises:
        RestoreError: a target's sharding names a mesh without devices, and no mesh like it is set.
    """
    results: list[Any] = [None] * len(placements)
    jobs: list[_Job] = []
    for index, placement in enumerate(placements):
        if placement.spec.array_type in ("numpy", "scalar"):
            results[index] = _numpy(placement)
        else:
            weak = _is_weak(placement.spec, placement.like)
            jobs.append(_Job(index, placement, weak, *destination(placement.like, placement.sharding)))
    if jobs and was_forked():
        raise RestoreError(
            "this process was forked, and jax, whose threads a forked child does not have, could hang in it: "
            "restore into numpy arrays here (sharding=numpy.ndarray without a target), or start the child "
            "with multiprocessing.get_context('spawn')"
        )
    if jobs:
        in_own_thread(lambda: _run(jobs, results))
    return results


class _Job(NamedTuple):
    """An array to make: committed to the sharding or format `to`, or else uncommitted on `device`."""

    number: int
    placement: Placement
    weak: bool
    to: Any
    device: Any


def _numpy(placement: Placement) -> Any:
    host = placement.host
    if placement.spec.array_type == "scalar":
        return _scalar(host)
    if placement.owned and host.flags.writeable and host.flags.c_contiguous:
        return host
    return np.array(host, order="C", copy=True, subok=False)


def _scalar(host: np.ndarray[Any, Any]) -> Any:
    if host.dtype.kind == "U" and host.dtype.isnative:  # an item comes without the zeros at its end
        return np.str_(host.tobytes().decode(f"utf-32-{sys.byteorder[0]}e", "surrogatepass"))
    return np.bytes_(host.tobytes()) if host.dtype.kind == "S" else host[()]


def destination(like: Any, sharding: Any = None) -> tuple[Any, Any]:
    """Where an array goes: the sharding or format that it is committed to, or None and a device or None.

    Args:
        like: as of `Placement`.
        sharding: the same.

    Raises:
        RestoreError: a sharding names a mesh without devices, and no mesh like it is set.
    """
    if sharding is not None:
        return _concrete(sharding), None
    if isinstance(like, jax.Array | jax.Ref):
        if not like.committed:
            return None, next(iter(like.sharding.device_set))
        return layout(like) or like.sharding, None
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        config: Any = jax.config
        return None, config.jax_default_device
    return layout(like) or _concrete(sharding), None


def _is_weak(spec: ArraySpec, like: Any) -> bool:
    """Whether an array is to be weakly typed."""
    if isinstance(like, jax.Ref):  # the type of what it holds is the Ref's to say
        inner: Any = getattr(jax.typeof(like), "inner_aval", None)
        return bool(getattr(inner, "weak_type", spec.weak_type))
    return spec.weak_type


def layout(like: Any) -> Format | None:
    """The target's format where its layout is not row-major, which is what there is without a word."""
    if len(like.shape) < 2 or isinstance(like, jax.Ref) or is_key(like.dtype):
        return None
    layout: Any = like.format.layout
    if layout is None or tuple(layout.major_to_minor) == tuple(range(len(like.shape))):
        return None
    return like.format


def _concrete(sharding: Any) -> Any:
    """A sharding over a mesh without devices (`jax.eval_shape` gives such ones), on the mesh that is set."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.shape_tuple != sharding.mesh.shape_tuple:
        raise RestoreError(
            f"the target's sharding {sharding.spec} is over a mesh of {dict(sharding.mesh.shape)} without "
            "devices: restore inside `jax.set_mesh(mesh)` with the mesh it was made for, or give `sharding=`"
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _run(jobs: list[_Job], results: list[Any]) -> None:
    groups: defaultdict[Any, list[_Job]] = defaultdict(list)
    for job in jobs:
        host = job.placement.host
        kind = (host.shape, host.dtype, job.placement.spec.array_type, job.weak, job.to, job.device)
        groups[kind].append(job)
    made: list[jax.Array] = []
    for (*_, to, device), members in groups.items():
        # an uncommitted array goes to the default device, whatever program or call makes it
        with jax.default_device(device) if to is None else contextlib.nullcontext():
            done = _in_groups(members)
            done += _make(members[len(done) :])
        made += done
        for job, array in zip(members, done, strict=True):
            spec = job.placement.spec
            plain = spec.array_type == "jax" and not spec.ref
            results[job.number] = array if plain else _wrap(array, spec, to)
    jax.block_until_ready(made)  # pyright: ignore[reportUnknownMemberType]


def _wrap(array: jax.Array, spec: ArraySpec, to: Any) -> Any:
    """What the bits of an array stand for: a typed key, the contents of a Ref."""
    result: Any = array
    if spec.array_type == "key":
        result = jax.random.wrap_key_data(array, impl=spec.impl)
        if to is not None and result.sharding != to:  # a kind of sharding that says nothing of key bits
            result = jax.device_put(result, to)
    return jax.new_ref(result) if spec.ref else result


def _in_groups(jobs: list[_Job]) -> list[jax.Array]:
    """The first so many of the arrays, by programs; none where that does not pay."""
    host, to = jobs[0].placement.host, jobs[0].to
    plain = to is None or (isinstance(to, SingleDeviceSharding) and is_default_memory(to))
    if len(jobs) < _LEAST or host.nbytes > _SMALL_BYTES or not plain or jobs[0].weak:
        return []
    if host.dtype.name in _NO_PROGRAMS:
        return []
    program = _group_program(to)
    hosts = [job.placement.host for job in jobs]
    found: list[jax.Array] = []
    for start in range(0, len(hosts) - _GROUP + 1, _GROUP):
        found += program(*hosts[start : start + _GROUP])
    return found


@lru_cache(maxsize=64)
def _group_program(to: Any) -> Callable[..., tuple[jax.Array, ...]]:
    def restored(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return arrays

    return jax.jit(restored, out_shardings=None if to is None else (to,) * _GROUP)


@lru_cache(maxsize=64)
def _weak_program(to: Any) -> Callable[..., jax.Array]:
    def restored(zero: jax.Array, array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(zero, array.shape).at[...].set(array)

    return jax.jit(restored, out_shardings=to)


@lru_cache(maxsize=256)
def is_default_memory(sharding: SingleDeviceSharding) -> bool:
    (device,) = sharding.device_set
    return sharding.memory_kind in (None, device.default_memory().kind)


def _make(jobs: list[_Job]) -> list[jax.Array]:
    """Arrays of one kind, by one call: 40 us each on one device, where a call for each takes 80."""
    if not jobs:
        return []
    hosts = [job.placement.host for job in jobs]
    zero = _WEAK.get(hosts[0].dtype.name) if jobs[0].weak else None
    if zero is not None:
        with jax.enable_x64(hosts[0].dtype.name in ("float64", "int64", "complex128")):
            return [_weak_program(_of_bits(job))(zero, job.placement.host) for job in jobs]
    return _put(hosts, [_of_bits(job) for job in jobs])


def _of_bits(job: _Job) -> Any:
    """Where an array goes; of keys where their bits go, which have trailing dimensions of their own."""
    spec, to = job.placement.spec, job.to
    if spec.array_type != "key":
        return to
    if isinstance(to, NamedSharding):
        names = (*to.spec, *(None,) * (len(spec.stored_shape) - len(to.spec)))
        return NamedSharding(to.mesh, PartitionSpec(*names), memory_kind=to.memory_kind)
    return to if isinstance(to, SingleDeviceSharding) else None


def _put(hosts: list[np.ndarray[Any, Any]], where: list[Any]) -> list[jax.Array]:
    """`jax.device_put` into memory that is XLA's own."""
    hosts = [host if host.flags.c_contiguous else np.ascontiguousarray(host) for host in hosts]
    arrays: list[jax.Array] = jax.device_put(hosts, None if where[0] is None else where)
    for i, (host, to) in enumerate(zip(hosts, where, strict=True)):
        if host.nbytes and _shows(arrays[i], host):
            arrays[i] = _put_apart(host, to, arrays[i].sharding)
    return arrays


def _put_apart(host: np.ndarray[Any, Any], to: Any, sharding: Any) -> jax.Array:
    """The same of host memory that the device would take over."""
    if sharding.num_devices == 1:
        return jax.device_put(_misaligned(host), to)
    parts = [
        jax.device_put(
            _misaligned(host[index]), SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        )
        for device, index in sharding.addressable_devices_indices_map(host.shape).items()
    ]
    array = jax.make_array_from_single_device_arrays(host.shape, sharding, parts)
    return jax.device_put(array, to) if isinstance(to, Format) else array


def _shows(array: jax.Array, host: np.ndarray[Any, Any]) -> bool:
    """Whether the array lies in numpy's memory, as the CPU client makes it where the alignment allows."""
    if not on_cpu(array.sharding):
        return False
    first = host.ctypes.data
    last = first + host.nbytes
    shards = (
        [array] if array.sharding.num_devices == 1 else [shard.data for shard in array.addressable_shards]
    )
    return any(first <= shard.unsafe_buffer_pointer() < last for shard in shards)


def _misaligned(host: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy at an address that the CPU client does not take over."""
    copy = np.ndarray(host.shape, host.dtype, Slab().cut([host.nbytes])[0])
    copy[...] = host
    return copy
