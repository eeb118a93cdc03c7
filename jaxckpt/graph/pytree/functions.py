"""Functions among the leaves: their names, and what stands for them where the program is not at hand."""

from __future__ import annotations

import functools
from typing import Any

from jaxckpt.graph.pytree.unsavable import spell


class MissingFunction:
    """Stands for a function of a checkpoint that was opened without the program. Calling it raises."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_args: object, **_kwargs: object) -> object:
        """Raises: a checkpoint holds the name of a function only."""
        raise RuntimeError(
            f"{self.name} is not part of the checkpoint, only its name is; restore into a target that has it"
        )

    def __repr__(self) -> str:
        return f"<missing function {self.name}>"


def callable_name(value: Any) -> str:
    """The qualified name of a callable: the same in every process, so no address and no repr."""
    if isinstance(value, MissingFunction):
        return value.name
    if isinstance(value, functools.partial):
        return f"functools.partial({callable_name(value.func)})"
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(name, str):
        inner = getattr(value, "__wrapped__", None)
        return spell(type(value)) if inner is None else callable_name(inner)
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else name
