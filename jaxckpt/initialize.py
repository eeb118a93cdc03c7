"""An initializer traced once: its abstract result, and any part of it computed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh
from msgspec import Struct

from jaxckpt.errors import Problem, ProblemKind, RestoreError
from jaxckpt.graph.flatten import Flat, flatten
from jaxckpt.graph.model import ArraySpec, Leaf, LeafSpec
from jaxckpt.storage import devices


class Initializer(Struct, frozen=True, kw_only=True):
    """A traced ``init_fn``.

    Attributes:
        target: its result, with a `jax.ShapeDtypeStruct` for each `jax.Array`; other leaves as they are.
        jaxpr: the computation of those arrays.
        outputs: for each leaf of ``target`` its index among the outputs of ``jaxpr``, or -1.
    """

    target: Any
    jaxpr: Any
    outputs: tuple[int, ...]

    def compute(self, leaves: Sequence[int], shardings: Sequence[Any]) -> list[Any]:
        """The arrays at these leaves; the others are neither computed nor allocated.

        Args:
            leaves: indices into the leaves of ``target``.
            shardings: one for each, None for wherever JAX puts it.

        Returns:
            One for each leaf, None for one that is no `jax.Array` of the trace. It lies where its sharding
            says as far as a program can see to it under the mesh that is set.
        """
        # One program computes for one set of devices.
        groups: dict[Any, list[int]] = {}
        for place, (leaf, sharding) in enumerate(zip(leaves, shardings, strict=True)):
            if self.outputs[leaf] >= 0:
                groups.setdefault(_devices(sharding), []).append(place)
        results: list[Any] = [None] * len(leaves)
        for where, places in groups.items():
            outputs = [self.outputs[leaves[place]] for place in places]
            values = self._run(outputs, None if where is None else [shardings[place] for place in places])
            for place, value in zip(places, values, strict=True):
                results[place] = value
        return results

    def _run(self, outputs: Sequence[int], shardings: Sequence[Any] | None) -> Sequence[Any]:
        # To import it makes jax 0.12 trace anew all that was traced before: only whoever needs it pays.
        from jax.extend.core import jaxpr_as_fun

        run = jaxpr_as_fun(self.jaxpr)

        def part() -> list[Any]:
            results = run()
            return [results[index] for index in outputs]

        return jax.jit(part)() if shardings is None else jax.jit(part, out_shardings=list(shardings))()


def _devices(sharding: Any) -> frozenset[Any] | None:
    """The devices that a program's outputs can be asked to be on; None to leave that to JAX."""
    if sharding is None or isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return None
    devices = frozenset(sharding.device_set)
    current: Any = jax.sharding.get_mesh()
    return devices if current.empty or frozenset(current.devices.flat) == devices else None


def trace(init_fn: Callable[[], Any]) -> Initializer:
    """Traces ``init_fn()``, once, without computing an array."""
    leaves: list[Any] = []
    treedefs: list[Any] = []

    def run() -> list[Any]:
        found, treedef = jax.tree.flatten(init_fn())
        leaves.extend(found)
        treedefs.append(treedef)
        return [leaf for leaf in found if isinstance(leaf, jax.Array)]

    jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)()
    abstract = list(leaves)
    outputs = [-1] * len(leaves)
    arrays = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    for count, index in enumerate(arrays):
        abstract[index] = shapes[count]
        outputs[index] = count
    leaves.clear()  # tracers must not outlive their trace
    return Initializer(target=treedefs[0].unflatten(abstract), jaxpr=jaxpr, outputs=tuple(outputs))


def initialize_leaves(flat: Flat, wanted: Sequence[int], initializer: Initializer) -> list[Any]:
    """The values that an initializer gives for these leaves of a target, all of them abstract arrays.

    Raises:
        RestoreError: it lacks one, or gives another kind, shape or dtype.
    """
    given = flatten(initializer.target, target=True)
    problems: list[Problem] = []
    found: list[int] = []
    for index in wanted:
        leaf = flat.graph.leaves[index]
        other = given.graph.by_key.get(leaf.key)
        problem = _unfit(leaf, None if other is None else given.graph.leaves[other].spec)
        if problem is not None:
            problems.append(problem)
        elif other is not None:
            found.append(other)
    if problems:
        raise RestoreError("init_fn does not fit the target:", problems)
    likes = [flat.values[index] for index in wanted]
    computed = initializer.compute(found, [getattr(like, "sharding", None) for like in likes])
    values = [
        given.values[other] if value is None else value for other, value in zip(found, computed, strict=True)
    ]
    specs = [flat.graph.leaves[index].spec for index in wanted]
    return devices.conform(values, specs, likes)


def _unfit(leaf: Leaf, given: LeafSpec | None) -> Problem | None:
    """What is wrong with what an initializer gives for a leaf, if anything."""
    wanted = leaf.spec
    kind: ProblemKind | None = None
    if given is None:
        kind = "missing"
    elif not isinstance(given, ArraySpec) or not isinstance(wanted, ArraySpec) or given.impl != wanted.impl:
        kind = "kind"
    elif given.shape != wanted.shape:
        kind = "shape"
    elif given.dtype != wanted.dtype:
        kind = "dtype"
    if kind is None:
        return None
    saved = "nothing from init_fn" if given is None else f"{given} from init_fn"
    return Problem(
        key=leaf.key, kind=kind, saved=saved, wanted=str(wanted), hint="init_fn gives the whole tree"
    )
