"""Shardings as plain data."""

from __future__ import annotations

from typing import Any

from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxckpt.graph.model import Sharding


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
