"""A pytree with one more value in it: immutable insertion by key, for deferred restoration."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxckpt.graph.model import escape, join


def unescape(name: str) -> str:
    """The name behind one step of a key: the reverse of `escape`."""
    if name == ".E":
        return ""
    out: list[str] = []
    index = 0
    while index < len(name):
        pair = name[index : index + 2]
        out.append({"..": ".", ".S": "/"}.get(pair, name[index]))
        index += 2 if pair in ("..", ".S") else 1
    return "".join(out)


def grow(tree: Any, names: Sequence[str], value: Any, at: str = "") -> Any:
    """``tree`` with ``value`` at the path ``names``; containers on the way are copied, never changed.

    Where the path ends at a container that exists, two mappings are merged; an empty container or None
    makes room. Steps that do not exist become dicts.

    Args:
        tree: a pytree of mappings, sequences, dataclasses and `Checkpoint`s.
        names: escaped names.
        value: what to put there.
        at: the key of ``tree``, for messages.

    Raises:
        ValueError: the place is taken, or its container cannot take another child.
    """
    if not names:
        return _merge(tree, value, at)
    name, rest = names[0], names[1:]
    here = join(at, name)
    if tree is None:
        return {unescape(name): grow(None, rest, value, here)}
    if isinstance(tree, Mapping):
        found: Any = next((key for key in tree if escape(str(key)) == name), unescape(name))
        return _with_item(tree, found, grow(tree.get(found), rest, value, here))
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return _with_index(tree, name, rest, value, here, at)
    return _with_attribute(tree, name, rest, value, here, at)


def _merge(old: Any, new: Any, at: str) -> Any:
    if old is None or (isinstance(old, Mapping | list | tuple) and not old):
        return new
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        result: Any = old
        for key, value in new.items():
            result = grow(result, [escape(str(key))], value, at)
        return result
    raise ValueError(
        f"{join(at)}: the tree has a {type(old).__name__} there already; "
        "attach takes names that are not in it yet"
    )


def _with_item(tree: Mapping[Any, Any], key: Any, value: Any) -> Any:
    items = {**tree, key: value}
    if isinstance(tree, defaultdict):
        return defaultdict(tree.default_factory, items)
    if isinstance(tree, OrderedDict):
        return OrderedDict(items)
    return type(tree)(items)  # pyright: ignore[reportCallIssue]


def _with_index(tree: Any, name: str, rest: Sequence[str], value: Any, here: str, at: str) -> Any:
    if not name.isdecimal() or int(name) > len(tree):
        raise ValueError(
            f"{here}: {join(at)} is a {type(tree).__name__} of {len(tree)}: "
            f"the next item is {join(at, str(len(tree)))}"
        )
    index = int(name)
    items = list(tree)
    items[index : index + 1] = [grow(items[index] if index < len(items) else None, rest, value, here)]
    return type(tree)(items)


def _with_attribute(tree: Any, name: str, rest: Sequence[str], value: Any, here: str, at: str) -> Any:
    field = unescape(name)
    grown = grow(getattr(tree, field, None), rest, value, here)
    if hasattr(tree, "_replace") and field in getattr(tree, "_fields", ()):
        return tree._replace(**{field: grown})
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        if field in {f.name for f in dataclasses.fields(tree)}:
            return dataclasses.replace(tree, **{field: grown})
    elif hasattr(tree, "replace"):
        edges: Any = tree  # a `Checkpoint`
        return edges.replace(**{field: grown})
    raise ValueError(f"{here}: {join(at)} is a {type(tree).__name__}, which cannot take another child")
