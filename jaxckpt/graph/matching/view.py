"""The saved graph as a restore sees it: from the node ``at``, and its containers whose shape counts."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from jaxckpt.errors import RestoreError
from jaxckpt.graph.model import (
    ROOT,
    SLOT_MARK,
    Leaf,
    Name,
    ObjectGraph,
    StateField,
    Structure,
    join,
    slot_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


#: Before an integer key that stands beside a string of the same spelling.
_INT = ".N"


def state_container(state: StateField) -> str:
    """The key of a state: ``<optimizer>/<StateClass>``, from the second of a class on with ``.2``."""
    ordinal = f".{state.ordinal}" if state.ordinal > 1 else ""
    return join(state.optimizer, state.state_class + ordinal)


def state_key(state: StateField) -> str:
    """The key of a leaf by its place in the optimizer: of a variable its key, of a slot a second name."""
    return join(state_container(state), state.field, *state.path, *state.suffix)


def slot_name(leaf: Leaf) -> str:
    """What stands after the optimizer in a slot's key ("mu", "mu.2", "mu/0")."""
    assert leaf.state is not None
    assert leaf.variable is not None
    prefix = slot_key(leaf.variable, leaf.state.optimizer, "")
    return leaf.key[len(prefix) + 1 :]


class View(Struct, frozen=True, kw_only=True):
    """A saved graph seen from a node.

    Attributes:
        leaves: for each leaf of the graph how it is seen, or None outside and for leaves without a value.
        structure: the structure at that node, or None where the node is part of an optimizer.
        optimizers: keys of the optimizers, as seen.
        all_optimizers: the same, as the graph spells them.
    """

    leaves: tuple[Leaf | None, ...]
    structure: Structure | None
    optimizers: frozenset[str]


def look(graph: ObjectGraph, at: str = "") -> View:
    """The graph seen from the node ``at``.

    Raises:
        RestoreError: there is no such node.
    """
    visible = tuple(None if leaf.kind == "skipped" else leaf for leaf in graph.leaves)
    optimizers = optimizers_of(graph)
    if not at:
        return View(leaves=visible, structure=graph.structure, optimizers=optimizers)
    leaves = tuple(None if leaf is None else _seen(leaf, at) for leaf in visible)
    inner = [key for key in optimizers if _below(key, at) is not None]
    structure = (
        None
        if any(_below(at, key) not in (None, ROOT) for key in optimizers)
        else _descend(graph.structure, at)
    )
    if structure is None and not any(leaf is not None for leaf in leaves):
        close = difflib.get_close_matches(at, sorted(_nodes(graph)), n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise RestoreError(f"at={at!r}: the checkpoint has no such node{hint}")
    return View(
        leaves=leaves,
        structure=structure,
        optimizers=frozenset(_below(key, at) or ROOT for key in inner),
    )


def optimizers_of(graph: ObjectGraph) -> frozenset[str]:
    """Keys of the graph's optimizers."""
    keys = {leaf.state.optimizer for leaf in graph.leaves if leaf.state is not None}
    return frozenset(keys | {node.key for node in graph.nodes if node.kind == "optimizer"})


def _below(key: str, at: str) -> str | None:
    """The key as seen from ``at``, or None if it is not there."""
    if key == at:
        return ROOT
    if at == ROOT:
        return key
    return key[len(at) + 1 :] if key.startswith(at) and key[len(at)] == "/" else None


def _seen(leaf: Leaf, at: str) -> Leaf | None:
    state = leaf.state
    optimizer = None if state is None else _below(state.optimizer, at)
    if state is not None and optimizer is not None:
        inner = replace(state, optimizer=optimizer)
        variable = None if leaf.variable is None else _below(leaf.variable, at)
        if variable is not None:
            key = slot_key(variable, optimizer, slot_name(leaf))
        else:
            key = state_key(inner) if state.is_slot else (_below(leaf.key, at) or leaf.key)
        return Leaf(key=key, node=leaf.node, spec=leaf.spec, state=inner, variable=variable)
    if leaf.variable is not None:
        return None  # the slot of an optimizer outside
    key = _below(leaf.key, at)
    return None if key is None else Leaf(key=key, node=leaf.node, spec=leaf.spec)


def _descend(structure: Structure, at: str) -> Structure | None:
    steps: list[tuple[Structure, tuple[str, ...]]] = [(structure, tuple(at.split("/")))]
    while steps:
        here, names = steps.pop()
        if not names:
            return here
        for name, child in zip(here.names, here.children, strict=True):
            if not name.name:  # a box that is not spelled
                steps.append((child, names))
            elif name.name == names[0]:
                steps.append((child, names[1:]))
    return None


def _nodes(graph: ObjectGraph) -> set[str]:
    found = {node.key for node in graph.nodes if node.kind in ("container", "optimizer")}
    for leaf in graph.leaves:
        if leaf.variable is None:
            found.add(leaf.key)
    return {key for key in found if SLOT_MARK not in key}


class Container(NamedTuple):
    """A container whose shape or kind counts.

    Attributes:
        type: "none", "empty", "sequence", "fields" (a namedtuple), or "keys" (a dict with integer keys).
        names: of its children.
        position: where it stands among the leaves, to order problems by.
    """

    type: str
    names: tuple[Name, ...]
    position: float


def containers(structure: Structure | None, optimizers: frozenset[str]) -> dict[str, Container]:
    """Those containers by key; optimizers are dissolved and have none."""
    found: dict[str, Container] = {}
    if structure is None:
        return found
    position = -0.5
    stack: list[tuple[str, Structure]] = [("", structure)]
    while stack:
        key, here = stack.pop()
        if here.type == "leaf":
            position = here.leaf + 0.5
            continue
        if (key or ROOT) in optimizers:
            continue
        kind = _container_type(here)
        if kind:
            found[key or ROOT] = Container(kind, here.names, position)
        if here.children and all(child.type == "leaf" for child in here.children):  # as most that are large
            position = here.children[-1].leaf + 0.5
            continue
        prefix = key + "/" if key else ""
        for name, child in zip(reversed(here.names), reversed(here.children), strict=True):
            stack.append((prefix + name.name if name.name else key, child))
    return found


def _container_type(structure: Structure) -> str:
    if structure.type == "none":
        return "none"
    if not structure.children:
        return "empty"
    if structure.type in ("list", "tuple"):
        return "sequence"
    if structure.type == "namedtuple":
        return "fields"
    return "keys" if any(name.type == "int" for name in structure.names) else ""


def field_index(container: Container, name: str) -> str | None:
    """The index of a namedtuple's field, as a name."""
    for index, field in enumerate(container.names):
        if field.name == name:
            return str(index)
    return None


def other_spelling(here: Container | None, there: Container | None, name: str) -> str | None:
    """How a child is called on the other side, if one is a namedtuple and the other a plain sequence."""
    if here is None:
        return None
    if here.type == "fields":
        return field_index(here, name)
    if here.type == "sequence" and there is not None and there.type == "fields":
        index = int(name) if name.isdecimal() else -1
        return there.names[index].name if 0 <= index < len(there.names) else None
    return None


def told_apart(container: Container) -> bool:
    """Whether it has an integer key beside a string of the same spelling (spelled ``.N1`` and ``1``)."""
    return any(name.name.startswith(_INT) for name in container.names)


def integer_spelling(here: Container | None, there: Container | None, name: str) -> str | None:
    """How a child is called on the other side, if one of them tells an integer key from a string.

    None if as here. An integer is the other side's integer, however either spells it.
    """
    if here is None or there is None:
        return None
    ours = {key.name: key.type for key in here.names}
    theirs = {key.name: key.type for key in there.names}
    if ours.get(name) == "int" and _INT + name in theirs:
        return _INT + name
    plain = name.removeprefix(_INT)
    if plain != name:
        return plain if theirs.get(plain) == "int" and name not in theirs else None
    # Here the string of a pair, there an integer alone: another key, spelled as nothing is.
    return _INT + name if _INT + name in ours and theirs.get(name) == "int" else None


def above(keys: Mapping[str, object]) -> dict[str, str]:
    """For each container above one of the keys one key below it. Slots stand below no container of theirs."""
    found: dict[str, str] = {}
    for key in keys:
        if SLOT_MARK in key and SLOT_MARK in key.split("/"):
            continue
        end = key.rfind("/")
        while end > 0 and key[:end] not in found:
            found[key[:end]] = key
            end = key.rfind("/", 0, end)
        if key != ROOT:
            found.setdefault(ROOT, key)
    return found
