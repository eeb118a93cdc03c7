"""The containers of a pytree, one level at a time: classes, typed keys and positions."""

from __future__ import annotations

import base64
import re
import sys
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    SequenceKey,
    flatten_one_level_with_keys,
    is_tree_node,
)
from msgspec import Struct

from jaxckpt.errors import UnsupportedLeafError
from jaxckpt.graph.marks import Optimizer, PerProcess, Values
from jaxckpt.graph.model import Name, Structure, StructureType, escape, join, spell
from jaxckpt.graph.pytree.boxes import is_box, is_checkpoint
from jaxckpt.graph.pytree.standin import StandIn, structure_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BUILTIN: dict[type, StructureType] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    defaultdict: "defaultdict",
    list: "list",
    tuple: "tuple",
    type(None): "none",
}
_FACTORIES: dict[object, str] = {list: "list", dict: "dict", int: "int", float: "float"}
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
#: Auxiliary data that says nothing.
_NOTHING: tuple[object, ...] = (None, (), [], {})


class Walk(Struct, frozen=True, kw_only=True):
    """A tree's structure and what the structure alone cannot hold.

    Attributes:
        structure: the tree, leaves numbered in JAX's order.
        of: for each path (escaped names) at which an `Optimizer` mark with ``of`` stands, that key.
        leaves: its leaves, in JAX's order.
    """

    structure: Structure
    of: Mapping[tuple[str, ...], str]
    leaves: list[Any]


@dataclass(slots=True)
class _Walker:
    prefix: str
    of: dict[tuple[str, ...], str] = field(default_factory=dict[tuple[str, ...], str])
    leaves: list[Any] = field(default_factory=list[Any])

    def key(self, path: Sequence[str]) -> str:
        return join(self.prefix, spell(path))

    def walk(self, tree: Any, path: tuple[str, ...]) -> Structure:
        if not is_tree_node(type(tree)):
            self.leaves.append(tree)
            return Structure(type="leaf", leaf=len(self.leaves) - 1)
        pairs, aux = self.one_level(tree, path)
        shape = self.container(tree, [key for key, _ in pairs], aux, path)
        if isinstance(tree, Optimizer) and tree.of is not None:
            self.of.setdefault(path, tree.of)
        children: list[Structure] = []
        for name, (_, child) in zip(shape.names, pairs, strict=True):
            children.append(self.walk(child, (*path, name.name) if name.name else path))
        return Structure(
            type=shape.type, cls=shape.cls, names=shape.names, children=tuple(children), static=shape.static
        )

    def one_level(self, tree: Any, path: tuple[str, ...]) -> tuple[list[tuple[Any, Any]], Any]:
        try:
            pairs, aux = flatten_one_level_with_keys(tree)
            return list(pairs), aux
        except (ValueError, TypeError) as error:
            if isinstance(tree, dict):
                types = sorted({type(key).__name__ for key in cast("dict[object, object]", tree)})
                reason = f"a dict whose keys jax cannot sort ({', '.join(types)})"
                remedy = "use keys of one type that can be compared, or an OrderedDict"
            else:
                reason, remedy = (
                    f"jax cannot flatten a {type(tree).__name__} ({error})",
                    "correct its registration",
                )
            raise UnsupportedLeafError(f"{self.key(path)}: {reason}; {remedy}") from error

    def container(self, tree: Any, keys: list[Any], aux: Any, path: tuple[str, ...]) -> Structure:
        if isinstance(tree, StandIn):
            return structure_of(tree)
        cls: type = type(tree)
        qualified = f"{cls.__module__}:{cls.__qualname__}"
        names = self.names(tree, keys, path)
        kind = _BUILTIN.get(cls)
        if kind == "defaultdict":
            return Structure(type=kind, cls=_FACTORIES.get(aux[0], ""), names=names)
        if kind is not None:
            return Structure(type=kind, names=names)
        if isinstance(tree, tuple) and hasattr(cls, "_fields") and aux is cls:
            return Structure(type="namedtuple", cls=qualified, names=names)
        if cls is getattr(sys.modules.get("flax.core"), "FrozenDict", None):
            return Structure(type="FrozenDict", names=names)
        static = not any(type(aux) is type(nothing) and aux == nothing for nothing in _NOTHING)
        return Structure(type="object", cls=qualified, names=names, static=static)

    def names(self, tree: Any, keys: list[Any], path: tuple[str, ...]) -> tuple[Name, ...]:
        if isinstance(tree, (Optimizer, Values, PerProcess)):
            return (Name(name="", type="attr", text=keys[0].name),)
        if isinstance(tree, tuple) and hasattr(tree, "_fields") and len(keys) == len(fields_of(tree)):
            # jax 0.10 gives the first field's key to every child
            return tuple(Name(name=escape(text), type="attr", text=text) for text in fields_of(tree))
        names = [_name(key) for key in keys]
        for name in names:
            if name.type == "repr" and _ADDRESS.search(name.text):
                raise UnsupportedLeafError(
                    f"{self.key(path)}: the key {name.text} is spelled with an address, "
                    "which no other run has; use keys that are strings or numbers"
                )
        if is_checkpoint(tree) and names and names[0].text == "_root":
            names[0] = Name(name="", type="attr", text="_root")
        if len(names) == 1 and names[0].name == "value" and names[0].type == "attr" and is_box(tree):
            return (Name(name="", type="attr", text="value"),)
        if len({name.name for name in names}) == len(names):
            return tuple(names)
        return self.apart(names, path)

    def apart(self, names: list[Name], path: tuple[str, ...]) -> tuple[Name, ...]:
        """Tells an integer key from a string of the same spelling; nothing else can be told apart."""
        strings = {name.name for name in names if name.type == "str"}
        # No other name begins with a single dot followed by N: `escape` doubles the dots of names.
        told = [
            Name(name=f".N{name.name}", type=name.type, text=name.text)
            if name.type == "int" and name.name in strings
            else name
            for name in names
        ]
        seen: dict[str, Name] = {}
        for name in told:
            other = seen.setdefault(name.name, name)
            if other is not name:
                raise UnsupportedLeafError(
                    f"{self.key((*path, name.name))}: two keys of one container have this name, "
                    f"of type {other.type} and {name.type}; give one of them another name"
                )
        return tuple(told)


def fields_of(tree: object) -> tuple[str, ...]:
    """The fields of a namedtuple."""
    return cast("tuple[str, ...]", getattr(type(tree), "_fields", ()))


def child_names(tree: object) -> tuple[str, ...]:
    """The names of a container's own edges, as the program spells them; none for a leaf.

    Raises:
        UnsupportedLeafError: as for `walk`.
    """
    if not is_tree_node(type(tree)):
        return ()
    walker = _Walker("")
    pairs, aux = walker.one_level(tree, ())
    names = walker.container(tree, [key for key, _ in pairs], aux, ()).names
    found: list[str] = []
    for name, (_, child) in zip(names, pairs, strict=True):
        found += [name.text] if name.name else child_names(child)
    return tuple(found)


def _name(key: Any) -> Name:
    """One of JAX's key entries as a name with its type."""
    match key:
        case DictKey(key=inner):
            return _dict_key(inner)
        case GetAttrKey(name=name):
            return Name(name=escape(str(name)), type="attr", text=str(name))
        case SequenceKey(idx=index) | FlattenedIndexKey(key=index):
            return Name(name=escape(str(index)), type="index", text=str(index))
        case _:  # a class may bring key entries of its own
            for attribute in ("key", "name", "idx"):
                if hasattr(key, attribute):
                    return _dict_key(getattr(key, attribute))
            return _dict_key(key)


def _dict_key(key: Any) -> Name:
    match key:
        # What is equal as a key of a dict has one type here: an enum that is a string, numpy's integers.
        case str():
            kind, text = "str", str.__str__(key)
        case bool():
            kind, text = "bool", str(key)
        case int() | np.integer():
            kind, text = "int", str(int(cast("int", key)))
        case float():
            return Name(name=escape(float.__repr__(key)), type="float", text=float(key).hex())
        case bytes():
            text = base64.b64encode(key).decode("ascii")
            return Name(name=escape(bytes.__repr__(key)), type="bytes", text=text)
        case None:
            kind, text = "none", "None"
        case _:
            kind, text = "repr", str(key)
    return Name(name=escape(text), type=kind, text=text)


def walk(tree: Any, prefix: str = "") -> Walk:
    """Walks a tree.

    Args:
        tree: any pytree.
        prefix: what stands before the keys in errors.

    Raises:
        UnsupportedLeafError: a dict whose keys cannot be sorted, or two children with one name.
    """
    walker = _Walker(prefix)
    structure = walker.walk(tree, ())
    return Walk(structure=structure, of=walker.of, leaves=walker.leaves)
