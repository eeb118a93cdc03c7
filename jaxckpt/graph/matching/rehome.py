"""Saved slots whose subtree the target does not have go with another one of the same form.

Of several subtrees with the same paths and shapes (parameters and their moving average) a slot edge names the
first. When a target has another of them only, the slots are that one's, whatever rules it goes through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from msgspec.structs import replace

from jaxckpt.graph.matching.transforms import Made
from jaxckpt.graph.matching.view import slot_name
from jaxckpt.graph.model import ArraySpec, Leaf, join, slot_key

Leaves = Sequence[Leaf | None]


def rehome(
    leaves: Leaves, placed: Leaves, wanted: Collection[str], made: Iterable[Made]
) -> tuple[Leaf | None, ...] | None:
    """The leaves with such slots moved, or None if there are none.

    Args:
        leaves: saved leaves as seen from ``at``, before any rule.
        placed: the same after the renames, None where a rule drops them (and their slots with them).
        wanted: the target's keys.
        made: what the transforms take.
    """
    subtrees = _by_prefix(leaves)
    if not subtrees:
        return None
    present = {i for i, leaf in enumerate(placed) if leaf is not None and leaf.key in wanted}
    present.update(index for taken in made for index in taken.sources)
    result = list(leaves)
    variables = {leaf.key: i for i, leaf in enumerate(leaves) if leaf is not None and leaf.state is None}
    for prefix, slots in subtrees.items():
        paths = {leaf.state.path: leaf.variable for _, leaf in slots if leaf.state and leaf.variable}
        homes = {path: variables.get(variable) for path, variable in paths.items()}
        if any(index is None or index in present or placed[index] is None for index in homes.values()):
            continue
        other = _other(prefix, homes, variables, leaves, present)
        for index, leaf in slots if other is not None else ():
            assert leaf.state is not None
            assert other is not None
            variable = join(other, *leaf.state.path)
            key = slot_key(variable, leaf.state.optimizer, slot_name(leaf))
            result[index] = replace(leaf, key=key, variable=variable)
    return tuple(result) if any(a is not b for a, b in zip(result, leaves, strict=True)) else None


def _by_prefix(leaves: Leaves) -> dict[tuple[str, str], list[tuple[int, Leaf]]]:
    """Slots by their optimizer and the subtree that they mirror."""
    found: dict[tuple[str, str], list[tuple[int, Leaf]]] = {}
    for index, leaf in enumerate(leaves):
        if leaf is None or leaf.state is None or leaf.variable is None:
            continue
        prefix = _above(leaf.variable, leaf.state.path)
        if prefix is not None:
            found.setdefault((leaf.state.optimizer, prefix), []).append((index, leaf))
    return found


def _above(key: str, path: tuple[str, ...]) -> str | None:
    """The key of the subtree in which ``key`` has this path; none for a bare array or the root."""
    tail = "/" + "/".join(path)
    return key.removesuffix(tail) if path and key.endswith(tail) else None


def _other(
    home: tuple[str, str],
    homes: dict[tuple[str, ...], int | None],
    variables: dict[str, int],
    leaves: Leaves,
    present: Collection[int],
) -> str | None:
    """The first subtree of the same paths and shapes of which the target has something."""
    first = next(iter(homes))
    for key in variables:
        prefix = _above(key, first)
        if prefix is None or prefix == home[1]:
            continue
        found = {path: variables.get(join(prefix, *path)) for path in homes}
        alike = all(
            there is not None and here is not None and _shape(leaves[there]) == _shape(leaves[here])
            for there, here in zip(found.values(), homes.values(), strict=True)
        )
        if alike and any(index in present for index in found.values()):
            return prefix
    return None


def _shape(leaf: Leaf | None) -> object:
    return leaf.spec.shape if leaf is not None and isinstance(leaf.spec, ArraySpec) else leaf
