"""Values on devices: holding them for a save, making them for a restore, and saying how they lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt.graph.model import Sharding
from jaxckpt.storage.blank import Blank, blanks
from jaxckpt.storage.hold import Held, hold, hold_all
from jaxckpt.storage.place import Placement, place

__all__ = ["Blank", "Held", "Placement", "blanks", "conform", "describe", "hold", "hold_all", "place"]


def describe(array: object) -> Sharding | None:
    """How an array, or an abstract one, is laid out, as plain data.

    Returns:
        None for what has no sharding, and for what lies in the usual memory of one device.
    """
    sharding: Any = getattr(array, "sharding", None)
    if sharding is None:
        return None
    return _describe(sharding, tuple(getattr(array, "shape", ())))


def conform(values: Sequence[Any], specs: Sequence[Any], likes: Sequence[Any]) -> list[Any]:
    """Arrays of the right shape and dtype as `place` would make them for a target.

    What differs from the target in weak type, in being committed or in where it is, or is no `jax.Array`, is
    made anew.
    """
    results = list(values)
    wrong = [
        i
        for i, (value, spec, like) in enumerate(zip(values, specs, likes, strict=True))
        if not isinstance(value, jax.Array)
        or bool(getattr(value, "weak_type", False)) != spec.weak_type
        or value.committed != (getattr(like, "sharding", None) is not None)
        or (value.committed and value.sharding != like.sharding)
    ]
    hosts = hold_all([values[i] for i in wrong]).arrays
    placements = [
        Placement(host=host, spec=specs[i], like=likes[i]) for i, host in zip(wrong, hosts, strict=True)
    ]
    for i, value in zip(wrong, place(placements), strict=True):
        results[i] = value
    return results


@lru_cache(maxsize=4096)
def _describe(sharding: Any, shape: tuple[int, ...]) -> Sharding | None:
    kind: str | None = sharding.memory_kind
    if isinstance(sharding, NamedSharding):
        spec = tuple(_axes(entry) for entry in sharding.spec)
        return Sharding(
            mesh=tuple((str(name), int(size)) for name, size in sharding.mesh.shape.items()),
            spec=spec + ((),) * (len(shape) - len(spec)),
            shard_shape=tuple(sharding.shard_shape(shape)),
            memory_kind=kind,
        )
    if sharding.num_devices == 1:
        (device,) = sharding.device_set
        if kind in (None, device.default_memory().kind):
            return None
    return Sharding(shard_shape=tuple(sharding.shard_shape(shape)), memory_kind=kind)


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(map(str, entry)) if isinstance(entry, tuple) else (str(entry),)
