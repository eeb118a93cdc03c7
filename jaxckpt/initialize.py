"""An initializer traced once: its abstract result, and any part of it computed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from msgspec import Struct


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
            leaves: indices into the leaves of ``target``, all of them arrays.
            shardings: one for each, None for the default device and an uncommitted array.
        """
        if not leaves:
            return []
        wanted = [self.outputs[leaf] for leaf in leaves]
        run = jaxpr_as_fun(self.jaxpr)

        def part() -> list[Any]:
            results = run()
            return [results[index] for index in wanted]

        return list(jax.jit(part, out_shardings=list(shardings))())


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
