"""Rules of ``rename=`` applied to a saved graph: all at once, slots following their parameters."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from jaxckpt.errors import RestoreError
from jaxckpt.graph.matching.patterns import Pattern, anchored, depth, plain
from jaxckpt.graph.matching.renamer import Hit, Renamer, numbered
from jaxckpt.graph.matching.view import Container, View, slot_name, state_key
from jaxckpt.graph.model import ROOT, SLOT_MARK, Leaf, StateField, slot_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxckpt.graph.rules import RenameRule, Rules


class Placed(Struct, frozen=True, kw_only=True):
    """A saved graph after its rules.

    Attributes:
        leaves: for each leaf of the graph how the target would call it; None outside and where dropped.
        pins: leaves that a rule put at one spelled key, whatever is there: index by that key.
        containers: those whose shape counts, by their new key.
        origins: the old keys of those that a rule moved, by the new one.
        ordained: leaves of states of which a rule says which of its class they are.
        spoken: how many names of its key a rule named, for each leaf that a rule named.
    """

    leaves: tuple[Leaf | None, ...]
    pins: dict[str, int]
    containers: dict[str, Container]
    origins: dict[str, str]
    spoken: dict[int, int]
    ordained: set[int]
    renamer: Renamer


def place(view: View, rules: Rules, found: dict[str, Container], targets: frozenset[str]) -> Placed:
    """Applies the rules.

    Args:
        view: the saved graph.
        rules: of which the renames are used.
        found: containers of ``view``.
        targets: keys of the target's optimizers, by which a state's new place is read.

    Raises:
        RestoreError: a rule matches nothing, or two things meet in one name.
    """
    renamer = Renamer(rules)
    if not renamer:
        return Placed(
            leaves=view.leaves,
            pins={},
            containers=found,
            origins={},
            spoken={},
            ordained=set(),
            renamer=renamer,
        )
    mover = _Mover(renamer, sorted(targets, key=depth, reverse=True))
    leaves = tuple(None if leaf is None else mover.leaf(i, leaf) for i, leaf in enumerate(view.leaves))
    moved: dict[str, Container] = {}
    origins: dict[str, str] = {}
    for key, container in found.items():
        hit = renamer.find(key)
        if hit is None:
            moved[key] = container
        elif hit.key is not None:
            moved[hit.key] = container
            origins[hit.key] = key
    _check_used(renamer, view, found)
    _check_meetings(view, leaves, mover.pins)
    return Placed(
        leaves=leaves,
        pins=mover.pins,
        containers=moved,
        origins=origins,
        spoken=mover.spoken,
        ordained=mover.ordained,
        renamer=renamer,
    )


class _Mover:
    def __init__(self, renamer: Renamer, targets: list[str]) -> None:
        self.renamer = renamer
        self.targets = targets
        self.pins: dict[str, int] = {}
        self.spoken: dict[int, int] = {}
        self.ordained: set[int] = set()
        self._paths: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    def leaf(self, index: int, leaf: Leaf) -> Leaf | None:
        if leaf.state is None:
            return self._plain(index, leaf)
        if leaf.variable is not None and self.renamer.marked:
            hit = self.renamer.find(leaf.key, marked=True)
            if hit is not None:
                return self._hit(index, leaf, hit)
        hit = self.renamer.state(leaf.state)
        moved = None if leaf.variable is None else self.renamer.again(leaf.variable)
        if (hit is not None and hit.key is None) or (moved is not None and moved.key is None):
            return None
        if hit is None and moved is None:
            return leaf
        state: StateField | None = leaf.state
        if hit is not None and hit.key is not None:
            state = self._state(index, leaf.state, hit, hit.key)
        if state is None:
            return self._hit(index, leaf, hit or Hit(leaf.key, 0))
        if leaf.variable is None:
            key = hit.key if hit is not None and hit.key is not None else leaf.key
            return Leaf(key=key, node=leaf.node, spec=leaf.spec, state=state)
        variable = leaf.variable
        if moved is not None and moved.key is not None:
            variable = moved.key
            state = replace(state, path=self._path(leaf.variable, leaf.state.path, variable))
        key = slot_key(variable, state.optimizer, slot_name(leaf))
        return Leaf(key=key, node=leaf.node, spec=leaf.spec, state=state, variable=variable)

    def _plain(self, index: int, leaf: Leaf) -> Leaf | None:
        hit = self.renamer.find(leaf.key)
        return leaf if hit is None else self._hit(index, leaf, hit)

    def _hit(self, index: int, leaf: Leaf, hit: Hit) -> Leaf | None:
        """A leaf that a rule puts at a key: a state's, if the target has an optimizer above it."""
        self.spoken[index] = hit.names
        key = hit.key
        if key is None:
            return None
        if SLOT_MARK in key.split("/"):
            if key in self.pins:
                raise RestoreError(f"rename: two saved slots would both be {key!r}")
            self.pins[key] = index
            return Leaf(key=key, node=leaf.node, spec=leaf.spec)
        state = None if leaf.variable is not None else self._read(key, None)
        return Leaf(key=key, node=leaf.node, spec=leaf.spec, state=state)

    def _read(self, key: str, like: StateField | None) -> StateField | None:
        for optimizer in self.targets:
            prefix = anchored(optimizer)
            rest = anchored(key)[len(prefix) :]
            if not anchored(key).startswith(prefix) or rest.count("/") < 2 or rest[0] != "/":
                continue
            cls, field, *path = rest[1:].split("/")
            name, ordinal = numbered(cls)
            count = len(like.suffix) if like is not None else 0
            return StateField(
                optimizer=optimizer,
                state_class=name,
                ordinal=ordinal,
                field=field,
                labels=like.labels if like is not None else (),
                path=tuple(path[: len(path) - count]),
                suffix=tuple(path[len(path) - count :]),
                is_slot=like is not None and like.is_slot,
            )
        return None

    def _state(self, index: int, state: StateField, hit: Hit, key: str) -> StateField | None:
        """The state at its new `state_key`."""
        if hit.names <= depth(state.optimizer):  # only the optimizer moved
            tail = depth(state_key(state)) - depth(state.optimizer)
            parts = anchored(key).split("/")
            return replace(state, optimizer="/".join(parts[1 : len(parts) - tail]) or ROOT)
        if self.renamer.ordains(hit, state):
            self.ordained.add(index)
        return self._read(key, state)

    def _path(self, old: str, path: tuple[str, ...], new: str) -> tuple[str, ...]:
        """The renamed parameter's path below the renamed subtree that the state mirrors."""
        known = self._paths.get((old, path))
        if known is None:
            names = anchored(old).split("/")[1:]
            subtree = plain("".join(f"/{name}" for name in names[: len(names) - len(path)]))
            hit = self.renamer.again(subtree)
            above = anchored(hit.key if hit is not None and hit.key is not None else subtree).split("/")[1:]
            names = anchored(new).split("/")[1:]
            below = names[: len(above)] == above
            known = tuple(names[len(above) :] if below else names[-len(path) :] if path else ())
            self._paths[old, path] = known
        return known


def _check_used(renamer: Renamer, view: View, found: dict[str, Container]) -> None:
    unused = [rule for index, rule in enumerate(renamer.rules) if index not in renamer.used]
    if not unused:
        return
    keys = set(found)
    for leaf in view.leaves:
        if leaf is not None:
            keys.add(leaf.key)
            if leaf.state is not None:
                keys.add(state_key(leaf.state))
    keys.update(view.optimizers)
    for rule in unused:
        # A more specific rule may have spoken about all that it names: that is no mistake.
        if not any(rule.source.covers(key) for key in keys):
            raise RestoreError(_names_nothing(rule, keys))


def _names_nothing(rule: RenameRule, keys: Iterable[str]) -> str:
    message = f"rename: {rule.source.text!r} names nothing in the checkpoint"
    if rule.target is None:
        return message
    reverse = f"{anchored(rule.target.text)}/"
    stars = rule.target.text.count("*")
    turned = stars == 0 and any(f"{anchored(key)}/".startswith(reverse) for key in keys)
    if stars:
        turned = any(Pattern.of(rule.target.text, "rename").covers(key) for key in keys)
    if turned:
        turn = f"{{{rule.target.text!r}: {rule.source.text!r}}}"
        return f"{message}, but {rule.target.text!r} does: rules go from saved to target, rename={turn}"
    close = difflib.get_close_matches(rule.source.text, sorted(keys), n=1)
    return f"{message}; did you mean {close[0]!r}?" if close else message


def _check_meetings(view: View, leaves: tuple[Leaf | None, ...], pins: dict[str, int]) -> None:
    """Two saved things in one name, or one above another: one of them would be lost in silence."""
    seen: dict[object, int] = {}
    problems: list[str] = []
    names: dict[str, int] = {}
    for index, leaf in enumerate(leaves):
        if leaf is None:
            continue
        first = seen.setdefault(_identity(leaf), index)
        if first != index:
            problems.append(_meeting(view, first, index, leaf.key))
        if leaf.state is None:
            names[leaf.key] = index
    for key, index in names.items():
        moved = leaves[index] is not view.leaves[index]
        end = key.rfind("/")
        while end > 0:
            upper = names.get(key[:end])
            if upper is not None and (moved or leaves[upper] is not view.leaves[upper]) and key not in pins:
                problems.append(_meeting(view, upper, index, key[:end]))
            end = key.rfind("/", 0, end)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise RestoreError(
            "rename: two saved things meet in one name\n  " + "\n  ".join(problems[:10]) + more
        )


def _meeting(view: View, first: int, second: int, key: str) -> str:
    one, two = view.leaves[first], view.leaves[second]
    assert one is not None
    assert two is not None
    return f"{one.key!r} and {two.key!r} would both be {key!r}"


def _identity(leaf: Leaf) -> object:
    state = leaf.state
    if state is None:
        return leaf.key
    place = (state.optimizer, state.state_class, state.ordinal, state.field, state.suffix)
    return (*place, state.path) if leaf.variable is None else (*place, leaf.variable, None)
