"""Containers whose one edge is not spelled in keys: nnx.Variable, and the boxes of flax linen.

flax is never imported here: an object of one of its classes exists only once it was.
"""

from __future__ import annotations

import sys
from typing import Any


def _classes() -> tuple[type, ...]:
    """The transparent classes of the flax modules that are loaded."""
    meta = sys.modules.get("flax.core.meta")
    nnx = sys.modules.get("flax.nnx")
    found: list[Any] = [getattr(meta, "AxisMetadata", None), getattr(nnx, "Variable", None)]
    return tuple(cls for cls in found if isinstance(cls, type))


def is_box(container: object) -> bool:
    """Whether the edge ``value`` of this container is dropped from names.

    The sharding names that such a box carries are the program's business, so a key is the same with
    and without it. Only its edge `value` is meant: a box with other edges keeps them.
    """
    return isinstance(container, _classes())


#: `jaxckpt.Checkpoint`, which is defined in a layer above this one.
CHECKPOINT = "jaxckpt.checkpoint:Checkpoint"


def is_checkpoint(container: object) -> bool:
    """Whether the edge ``_root`` is dropped: a `Checkpoint`'s edges stand beside those of its root."""
    cls = type(container)
    return f"{cls.__module__}:{cls.__qualname__}" == CHECKPOINT
