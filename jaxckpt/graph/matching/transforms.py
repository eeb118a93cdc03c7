"""Rules of ``transform=``: which saved leaves each target leaf is made of, and how its function is called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxckpt.errors import RestoreError
from jaxckpt.graph.model import ArraySpec, Leaf
from jaxckpt.graph.optimizers.slot_match import carried

if TYPE_CHECKING:
    from jaxckpt.graph.matching.patterns import Found, Pattern
    from jaxckpt.graph.rules import Rules, TransformRule

#: Takes the host arrays of a fill's sources, in order, and gives the value.
Assemble = Callable[[Sequence[object]], object]


class Made(NamedTuple):
    """What a target leaf is made of.

    Attributes:
        sources: saved indices, in the order in which ``function`` takes them; () if they are not all there.
        function: makes the value of the sources' arrays.
        indices: what stars of the target's side only stood for.
        lacking: what is not there, in words, when ``sources`` is ().
        rule: the rule, in words.
    """

    sources: tuple[int, ...]
    function: Assemble | None
    indices: tuple[str, ...]
    lacking: str
    rule: str


class _Column:
    """The saved leaves that one pattern names, by the names that its paired stars stood for."""

    def __init__(self, pattern: Pattern, paired: int, leaves: Iterable[tuple[int, Leaf]]) -> None:
        self.pattern = pattern
        self.paired = paired
        self.gathers = len(pattern.stars) > paired
        self.rows: dict[tuple[tuple[str, ...], str], list[tuple[list[tuple[int, str]], int]]] = {}
        for index, leaf in leaves:
            if leaf.variable is not None and not pattern.marked:
                continue  # slots go where their variables go
            found = pattern.find(leaf.key)
            if found is not None:
                row = self.rows.setdefault((found.stars[:paired], found.rest), [])
                row.append((natural("/".join(found.stars[paired:])), index))
        for row in self.rows.values():
            row.sort()

    def get(self, found: Found) -> list[int] | None:
        row = self.rows.get((found.stars[: self.paired], found.rest))
        return None if row is None else [index for _, index in row]


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def apply(rules: Rules, saved: Sequence[Leaf | None], target: Sequence[Leaf]) -> dict[int, Made]:
    """What the rules make each target leaf of, by target index; slots shaped like their parameter too.

    Args:
        rules: of which the transforms are used.
        saved: the saved leaves as seen from ``at``, before any rename.
        target: the target's leaves.

    Raises:
        RestoreError: a rule names nothing on one of its sides.
    """
    if not rules.transforms:
        return {}
    made: dict[int, Made] = {}
    depth: dict[int, int] = {}
    visible = [
        (index, leaf) for index, leaf in enumerate(saved) if leaf is not None and leaf.kind != "callable"
    ]
    for rule in rules.transforms:
        columns = _columns(rule, visible)
        matched = False
        for index, leaf in enumerate(target):
            found = (
                None if leaf.variable is not None and not rule.target.marked else rule.target.find(leaf.key)
            )
            if found is None or leaf.kind == "skipped":
                continue
            matched = True
            if depth.get(index, -1) < found.names:  # the longest of several rules
                depth[index] = found.names
                made[index] = _make(rule, columns, found)
        if not matched and not rules.attach:
            raise RestoreError(f"transform: {rule.target.text!r} names nothing in the target")
    return made


def _columns(rule: TransformRule, visible: list[tuple[int, Leaf]]) -> list[_Column]:
    columns: list[_Column] = []
    for source in rule.sources:
        paired = min(len(source.stars), len(rule.target.stars))
        column = _Column(source, paired, visible)
        if not column.rows:
            raise RestoreError(f"transform: {source.text!r} (of {rule}) names nothing in the checkpoint")
        columns.append(column)
    return columns


def _make(rule: TransformRule, columns: list[_Column], found: Found) -> Made:
    index = tuple(name.strip("/") for name in found.stars[max(column.paired for column in columns) :])
    parts = [column.get(found) for column in columns]
    lacking = [column.pattern.text for column, part in zip(columns, parts, strict=True) if part is None]
    rows = [part or [] for part in parts]
    counts = [len(row) if column.gathers else None for column, row in zip(columns, rows, strict=True)]
    function = assembler(rule.function, counts, index, single=rule.single)
    sources = () if lacking else tuple(item for row in rows for item in row)
    return Made(sources, function, index, " and ".join(map(repr, lacking)), str(rule))


def assembler(
    function: Callable[..., object], counts: Sequence[int | None], index: Sequence[str], *, single: bool
) -> Assemble:
    """How the sources' arrays become arguments of a rule's function.

    A list for each pattern that gathers (the count says how many), an array for each that does not, then
    what each scattering star stood for (as an integer if it is one).
    Several patterns go as one list to a function that takes one argument (`jnp.concatenate`).
    """
    one_list = not single and len(counts) > 1 and _takes_list(function, len(index))
    indices = [int(name) if name.isdecimal() else name for name in index]

    def assemble(arrays: Sequence[object]) -> object:
        arguments: list[object] = []
        start = 0
        for count in counts:
            arguments.append(arrays[start] if count is None else list(arrays[start : start + count]))
            start += 1 if count is None else count
        return function(*([arguments] if one_list else arguments), *indices)

    return assemble


def _takes_list(function: Callable[..., object], indices: int) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True  # numpy's own functions of several arrays take a list
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) == 1 + indices


def carry(
    made: Mapping[int, Made],
    seen: Sequence[Leaf | None],
    placed: Sequence[Leaf | None],
    target: Sequence[Leaf],
) -> dict[int, Made]:
    """What the slots of transformed variables are made of: the slots of the saved ones, the same way.

    Only slots shaped like their parameter go along, on both sides.

    Args:
        made: the transformed leaves, by target index.
        seen: the saved leaves before renames (a rule's saved side names these).
        placed: the saved leaves after renames (an optimizer may have another name).
        target: the target's leaves.
    """
    if not made:
        return {}
    slots: dict[str, list[int]] = {}
    for index, leaf in enumerate(target):
        if leaf.variable is not None and leaf.kind != "skipped" and index not in made:
            slots.setdefault(leaf.variable, []).append(index)
    by_variable: dict[str, list[int]] = {}
    for index, leaf in enumerate(seen):
        moved = placed[index]
        if leaf is not None and leaf.variable is not None and moved is not None and moved.state is not None:
            by_variable.setdefault(leaf.variable, []).append(index)
    wanted = dict(enumerate(target))
    saved = {index: leaf for index, leaf in enumerate(placed) if leaf is not None}
    result: dict[int, Made] = {}
    for index, rule in made.items():
        mine = slots.get(target[index].key)
        if not mine or not rule.sources:
            continue
        variables = [seen[item] for item in rule.sources]
        names = [leaf.key for leaf in variables if leaf is not None]
        shapes = [_shape(leaf) for leaf in variables]
        for slot, items in carried(wanted, saved, mine, names, by_variable).items():
            like = items is not None and _shape(target[slot]) == _shape(target[index])
            like = like and [_shape(seen[item]) for item in items or ()] == shapes
            lacking = (
                ""
                if like
                else "a slot shaped like its parameter for each of " + ", ".join(map(repr, names[:3]))
            )
            result[slot] = rule._replace(sources=items if like and items else (), lacking=lacking)
    return result


def _shape(leaf: Leaf | None) -> tuple[int, ...] | None:
    return leaf.spec.shape if leaf is not None and isinstance(leaf.spec, ArraySpec) else None
