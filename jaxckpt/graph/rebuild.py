"""A tree from a graph alone: no program, no import, nothing run that a file names."""

from __future__ import annotations

import importlib
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.graph.marks import OPTIMIZER, PER_PROCESS, VALUES, Optimizer, PerProcess, Values
from jaxckpt.graph.model import ROOT, CallableSpec, ObjectGraph, Structure, spell
from jaxckpt.graph.pytree.boxes import CHECKPOINT
from jaxckpt.graph.pytree.functions import MissingFunction
from jaxckpt.graph.pytree.standin import StandIn, raw_key

#: Makes an object from its structure (names of the children, in order) and its children.
Maker = Callable[[Structure, Sequence[Any]], Any]

#: Further classes of this library that come back as themselves, by ``module:qualname``.
known_classes: dict[str, Maker] = {}

#: Modules of this library that add to them, imported when their class is met.
_REGISTERED_BY = {CHECKPOINT: "jaxckpt.checkpoint"}

_FACTORIES: dict[str, Callable[[], Any]] = {"list": list, "dict": dict, "int": int, "float": float}


def rebuild(graph: ObjectGraph, values: Sequence[object]) -> Any:
    """The tree that a graph describes.

    dict, OrderedDict, defaultdict, list, tuple, FrozenDict, the marks, and a namedtuple whose class is
    already imported come back as they were; every other container as a `StandIn` with the same leaves
    under the same names.

    Args:
        graph: a graph, also one read from an untrusted file.
        values: one for each of its leaves, in order. Those of skipped leaves and of callables are not
            looked at: they come back as ``...`` and as a stand-in that raises when called.

    Raises:
        ValueError: on another number of values.
    """
    if len(values) != len(graph.leaves):
        raise ValueError(f"{len(values)} values for {len(graph.leaves)} leaves")
    return _Builder(graph, values).build(graph.structure, ())


class _Builder:
    def __init__(self, graph: ObjectGraph, values: Sequence[object]) -> None:
        self._graph = graph
        self._values = values

    def build(self, structure: Structure, path: tuple[str, ...]) -> Any:
        if structure.type == "leaf":
            return self._leaf(structure.leaf)
        children = tuple(
            self.build(child, (*path, name.name) if name.name else path)
            for name, child in zip(structure.names, structure.children, strict=True)
        )
        if structure.cls == OPTIMIZER and len(children) == 1:
            return Optimizer(children[0], of=self._of(spell(path)) if structure.static else None)
        return _container(structure, children)

    def _leaf(self, index: int) -> object:
        spec = self._graph.leaves[index].spec
        if isinstance(spec, CallableSpec):
            return MissingFunction(spec.name)
        return ... if spec.kind == "skipped" else self._values[index]

    def _of(self, optimizer: str) -> str | None:
        """The tree that the slots of an optimizer belong to, from one of them."""
        for leaf in self._graph.leaves:
            if leaf.state is not None and leaf.state.optimizer == optimizer and leaf.variable is not None:
                names = leaf.variable.split("/")
                return spell(names[: len(names) - len(leaf.state.path)]) if leaf.variable != ROOT else ROOT
        return None


def _container(structure: Structure, children: tuple[Any, ...]) -> Any:
    match structure.type:
        case "none":
            return None
        case "list":
            return list(children)
        case "tuple":
            return children
        case "dict" | "OrderedDict" | "defaultdict" | "FrozenDict":
            return _dict(structure, children)
        case "namedtuple":
            cls = _imported(structure)
            # `tuple.__new__` runs no code of the class.
            return StandIn(structure, children) if cls is None else tuple.__new__(cls, children)
        case _:
            pass
    if structure.cls in (VALUES, PER_PROCESS) and len(children) == 1:
        return Values(children[0]) if structure.cls == VALUES else PerProcess(children[0])
    if structure.cls in _REGISTERED_BY:
        importlib.import_module(_REGISTERED_BY[structure.cls])
    maker = known_classes.get(structure.cls)
    return StandIn(structure, children) if maker is None else maker(structure, children)


def _dict(structure: Structure, children: tuple[Any, ...]) -> Any:
    if any(name.type == "repr" for name in structure.names):
        return StandIn(structure, children)  # such keys cannot be made from their text
    pairs = [(raw_key(name), child) for name, child in zip(structure.names, children, strict=True)]
    match structure.type:
        case "OrderedDict":
            return OrderedDict(pairs)
        case "defaultdict":
            return defaultdict(_FACTORIES.get(structure.cls), pairs)
        case "FrozenDict":
            from flax.core import FrozenDict  # this library's own dependency, not a name from the file

            return FrozenDict(dict(pairs))
        case _:
            return dict(pairs)


def _imported(structure: Structure) -> type | None:
    """The namedtuple class of a structure, if it is imported and has these fields.

    Looked up in the dictionaries of modules and classes, so that no ``__getattr__`` of a module (a lazy
    import) and no descriptor runs.
    """
    module_name, _, qualified = structure.cls.partition(":")
    found: object = sys.modules.get(module_name)
    if not isinstance(found, types.ModuleType):
        return None
    for name in qualified.split("."):
        found = vars(found).get(name) if isinstance(found, (types.ModuleType, type)) else None
    if not isinstance(found, type) or not issubclass(found, tuple):
        return None
    fields = next((vars(base)["_fields"] for base in found.__mro__ if "_fields" in vars(base)), None)
    texts = tuple(name.text for name in structure.names)
    return found if isinstance(fields, tuple) and fields == texts else None
