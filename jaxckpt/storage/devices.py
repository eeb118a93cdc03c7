"""Values on devices: holding them for a save, making them for a restore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxckpt.storage.blank import Blank, blanks
from jaxckpt.storage.hold import Held, hold, hold_all
from jaxckpt.storage.place import Placement, place

__all__ = ["Blank", "Held", "Placement", "blanks", "conform", "hold", "hold_all", "place"]


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
