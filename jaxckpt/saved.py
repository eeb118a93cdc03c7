"""Restoring without a target: the saved structure, with its arrays wherever one likes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from msgspec.structs import replace

from jaxckpt.errors import RestoreError
from jaxckpt.fill import Filler
from jaxckpt.graph.collector import paused
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.match import Fill
from jaxckpt.graph.matching.view import look
from jaxckpt.graph.model import ROOT, ArraySpec, Leaf, LeafSpec, ObjectGraph, Structure
from jaxckpt.graph.rebuild import rebuild
from jaxckpt.graph.rules import Rules
from jaxckpt.graph.status import RestoreStatus
from jaxckpt.progress import Progress, shown
from jaxckpt.reader import CheckpointReader, PathLike, has_value, open_exact
from jaxckpt.restored import Restored, State
from jaxckpt.storage.format.dtypes import numpy_dtype

#: Where arrays go: a `jax.sharding.Sharding` or `Mesh`, a function of (key, ShapeDtypeStruct) that gives a
#: sharding or None, `numpy.ndarray`, or None for the default device.
Where = Any


def restore_saved(
    path: PathLike | CheckpointReader | None,
    at: str,
    sharding: Where,
    memory_limit: int | None,
    progress: Progress,
) -> Restored:
    """The saved structure, type for type where that needs no import of what a file names.

    Raises:
        RestoreError: there is no node ``at``.
    """
    rules = Rules.of(at=at)
    if path is None:
        flat = flatten(None, target=True)
        return Restored(State.nothing(flat, flat.values, rules))
    reader = path if isinstance(path, CheckpointReader) else open_exact(path)
    graph, keys = _below(reader.graph, rules.at)
    wanted = [index for index in keys if has_value(graph.leaves[index])]
    models = [_model(leaf, sharding) for leaf in graph.leaves]
    leaves = tuple(replace(leaf, spec=spec) for leaf, (spec, _) in zip(graph.leaves, models, strict=True))
    fills = [Fill("restored", (index,)) for index in range(len(leaves))]
    with shown(progress, "Restoring") as report, paused():
        filler = Filler(
            reader,
            replace(graph, leaves=leaves),
            [like for _, like in models],
            fills,
            memory_limit=memory_limit,
            progress=report,
        )
        filled = filler.fill(wanted)
    flat = flatten(rebuild(graph, [filled.get(index, ...) for index in range(len(leaves))]), target=True)
    status = RestoreStatus(restored={keys[index]: (graph.leaves[index].key,) for index in wanted})
    return Restored(
        State(
            flat=flat,
            values=flat.values,
            status=status,
            reader=reader,
            rules=rules,
            memory_limit=memory_limit,
        )
    )


def saved_target(reader: CheckpointReader, sharding: Where) -> Any:
    """The saved structure with a `jax.ShapeDtypeStruct` for each array."""
    return rebuild(reader.graph, [_abstract_leaf(reader, leaf, sharding) for leaf in reader.graph.leaves])


def _below(graph: ObjectGraph, at: str) -> tuple[ObjectGraph, dict[int, str]]:
    """The graph with the structure at a node, and the keys, as seen from there, of its leaves."""
    view = look(graph, at)
    structure = view.structure
    if structure is None:
        only = [index for index, leaf in enumerate(view.leaves) if leaf is not None and leaf.key == ROOT]
        if len(only) != 1:
            raise RestoreError(
                f"at={at!r} is a part of an optimizer, which has no structure of its own: give a target"
            )
        structure = Structure(type="leaf", leaf=only[0])
    below = replace(graph, structure=structure)
    keys: dict[int, str] = {}
    for _, part in below.walk():
        seen = view.leaves[part.leaf] if part.leaf >= 0 else None
        if seen is not None:
            keys[part.leaf] = seen.key
        elif part.leaf >= 0:
            keys[part.leaf] = graph.leaves[part.leaf].key
    return below, keys


def _model(leaf: Leaf, sharding: Where) -> tuple[LeafSpec, Any]:
    """What an array comes back as: its spec, and a model for its placement."""
    spec = leaf.spec
    if not isinstance(spec, ArraySpec) or spec.array_type not in ("jax", "key"):
        return spec, None
    # While x64 is off JAX would halve a 64-bit array; numpy keeps it whole.
    dtype = numpy_dtype(spec.dtype)
    if sharding is np.ndarray or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        plain = ArraySpec(shape=spec.stored_shape, dtype=spec.dtype, array_type="numpy")
        return plain, None
    return spec, abstract(leaf.key, spec, sharding)


def _abstract_leaf(reader: CheckpointReader, leaf: Leaf, sharding: Where) -> Any:
    if isinstance(leaf.spec, ArraySpec):
        dtype = numpy_dtype(leaf.spec.dtype)
        if sharding is np.ndarray or dtype.kind in "USMm" or not dtype.isnative:
            # JAX has no such dtype: numpy's place holder, which takes no memory whatever its shape.
            return np.broadcast_to(np.zeros((), dtype), leaf.spec.stored_shape)
        return abstract(leaf.key, leaf.spec, sharding)
    if leaf.kind == "value":
        return reader[leaf.key]
    return ...


def _on_mesh(mesh: jax.sharding.Mesh, spec: ArraySpec) -> jax.sharding.NamedSharding:
    """The saved layout on another mesh, by its axis names; whole where an axis lacks or does not divide."""
    axes: list[tuple[str, ...] | None] = []
    for length, names in zip(spec.shape, spec.sharding.spec if spec.sharding else (), strict=False):
        there = tuple(name for name in names if name in mesh.shape)
        parts = math.prod(mesh.shape[name] for name in there)
        axes.append(there if there and length % parts == 0 else None)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def abstract(key: str, spec: ArraySpec, sharding: Where) -> jax.ShapeDtypeStruct:
    """An abstract array like a saved one."""
    dtype: Any = numpy_dtype(spec.dtype)
    if spec.impl is not None:
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=spec.impl)).dtype
    plain = jax.ShapeDtypeStruct(spec.shape, dtype, weak_type=spec.weak_type)
    where: Any = _on_mesh(sharding, spec) if isinstance(sharding, jax.sharding.Mesh) else sharding
    if (
        not isinstance(sharding, jax.sharding.Mesh)
        and isinstance(sharding, Callable)
        and not isinstance(sharding, jax.sharding.Sharding)
    ):
        where = sharding(key, plain)
    if where is None:
        return plain
    if not isinstance(where, jax.sharding.Sharding):
        raise TypeError(
            "sharding= takes a jax.sharding.Sharding or Mesh, a function of (key, ShapeDtypeStruct) that "
            f"gives one or None, or numpy.ndarray; for {key} it is {where!r}"
        )
    return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where, weak_type=spec.weak_type)
