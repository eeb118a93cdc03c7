"""Marks that a user puts into a tree. Each is a pytree of one child and has no name of its own in keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.tree_util import GetAttrKey, register_pytree_with_keys


@dataclass(frozen=True, slots=True, eq=False)
class Optimizer:
    """Marks an optimizer's state, optax's or any other.

    Attributes:
        state: the state.
        of: key of the parameters (or of a tree that holds them) that its slots belong to; None to look
            for them: the first tree in edge order with the same paths and shapes.
    """

    state: Any
    of: str | None = None

    def __post_init__(self) -> None:
        if self.of is not None and type(self.of) is not str:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(f"Optimizer(of=...) takes a key such as 'net', got {type(self.of).__name__}")


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Marks a tree in which no optimizer is looked for: every leaf is a plain variable."""

    tree: Any


@dataclass(frozen=True, slots=True, eq=False)
class PerProcess:
    """Marks a value that is meant to differ between processes."""

    value: Any


def _register(cls: type, field: str, static: str | None = None) -> None:
    def with_keys(mark: Any) -> Any:
        return ((GetAttrKey(field), getattr(mark, field)),), static and getattr(mark, static)

    def build(aux: Any, children: Any) -> Any:
        (child,) = children
        return cls(child, aux) if static else cls(child)

    register_pytree_with_keys(cls, with_keys, build)


_register(Optimizer, "state", "of")
_register(Values, "tree")
_register(PerProcess, "value")

#: Structure.cls of each mark.
OPTIMIZER, VALUES, PER_PROCESS = (
    f"{cls.__module__}:{cls.__qualname__}" for cls in (Optimizer, Values, PerProcess)
)
