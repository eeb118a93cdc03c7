"""What stands for a container whose class is not at hand: the same leaves under the same names."""

from __future__ import annotations

import base64
from typing import Any

from jax.tree_util import DictKey, GetAttrKey, SequenceKey, register_pytree_with_keys_class

from jaxckpt.graph.model import Name, Structure


def raw_key(name: Name) -> object:
    """The key behind a name, as the program spelled it.

    Raises:
        ValueError: if the text is none of its type.
    """
    match name.type:
        case "int" | "index":
            return int(name.text)
        case "float":
            return float.fromhex(name.text)
        case "bool":
            return {"True": True, "False": False}[name.text]
        case "none":
            return None
        case "bytes":
            return base64.b64decode(name.text, validate=True)
        case _:
            return name.text


class StandIn:
    """A readable stand-in for an object of a checkpoint whose class only the program knows.

    Its children are attributes (``model.weight``) or items (``state["kernel"]``, ``node[0]``), whichever
    they were. It is a pytree with the leaves and the names of the original, so that it can be saved,
    restored into, and compared with the program's own.
    """

    __slots__ = ("_children", "_structure")

    def __init__(self, structure: Structure, children: tuple[Any, ...]) -> None:
        if len(structure.names) != len(children):
            raise ValueError(f"{len(structure.names)} names for {len(children)} children")
        self._structure = Structure(
            type=structure.type, cls=structure.cls, names=structure.names, static=structure.static
        )
        self._children = tuple(children)

    def __getattr__(self, name: str) -> Any:
        if name in StandIn.__slots__:
            raise AttributeError(name)  # copying and unpickling look for attributes before there is one
        if not name.startswith("__"):
            for key, child in zip(self._structure.names, self._children, strict=True):
                if key.type == "attr" and key.text == name:
                    return child
        raise AttributeError(f"{self._title()} has no attribute {name!r}")

    def __getitem__(self, item: object) -> Any:
        for key, child in zip(self._structure.names, self._children, strict=True):
            if key.type != "attr" and (raw := raw_key(key)) == item and type(raw) is type(item):
                return child
        raise KeyError(item)

    def __iter__(self) -> Any:
        return iter(self._children)

    def __len__(self) -> int:
        return len(self._children)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(key.text for key in self._structure.names if key.type == "attr")]

    def _title(self) -> str:
        return self._structure.cls.rpartition(":")[2].rpartition(".")[2] or self._structure.type

    def __repr__(self) -> str:
        pairs = zip(self._structure.names, self._children, strict=True)
        inner = ", ".join(
            f"{key.text}={child!r}" if key.type == "attr" else f"{key.text!r}: {child!r}"
            for key, child in pairs
        )
        return f"<{self._title()}({inner})>"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Structure]:
        """For JAX: children with their keys; the structure is static."""
        return [
            (_entry(name), child) for name, child in zip(self._structure.names, self._children, strict=True)
        ], self._structure

    @classmethod
    def tree_unflatten(cls, structure: Structure, children: Any) -> StandIn:
        """For JAX."""
        return cls(structure, tuple(children))


def _entry(name: Name) -> Any:
    match name.type:
        case "attr":
            return GetAttrKey(name.text)
        case "index":
            return SequenceKey(int(name.text))
        case _:
            return DictKey(raw_key(name))


register_pytree_with_keys_class(StandIn)


def structure_of(stand_in: StandIn) -> Structure:
    """Class name and names of a stand-in, without its children."""
    return stand_in.tree_flatten_with_keys()[1]
