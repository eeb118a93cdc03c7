"""Where the structures of checkpoint and target disagree: None, empty containers, lists, containers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from jaxckpt.graph.matching.patterns import anchored, depth
from jaxckpt.graph.matching.view import Container, View, above, integer_spelling, other_spelling, told_apart
from jaxckpt.graph.model import ROOT, Leaf, join

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from jaxckpt.errors import ProblemKind
    from jaxckpt.graph.matching.renames import Placed


class Finding(NamedTuple):
    """A problem before its hint.

    Attributes:
        position: where it stands among the target's leaves.
        key: of the target's leaf or container.
        kind: see `jaxckpt.errors.ProblemKind`.
        saved: the checkpoint's side, in words.
        wanted: the target's side, in words.
        hint: what is known to help, or "".
        target: index of the target's leaf, or -1.
        source: index of the saved leaf, or -1.
    """

    position: float
    key: str
    kind: ProblemKind
    saved: str
    wanted: str
    hint: str = ""
    target: int = -1
    source: int = -1


@dataclass(kw_only=True)
class Names:
    """The saved leaves and containers by the target's names.

    Attributes:
        view: the saved graph before renames.
        placed: after them.
        wanted: the target's containers whose shape counts.
    """

    view: View
    placed: Placed
    wanted: Mapping[str, Container]
    plain: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.plain = {
            leaf.key: index
            for index, leaf in enumerate(self.placed.leaves)
            if leaf is not None and leaf.state is None
        }

    @cached_property
    def above(self) -> dict[str, str]:
        """Saved containers that have leaves, each with the key of one."""
        return above(
            {leaf.key: None for leaf in self.placed.leaves if leaf is not None and leaf.variable is None}
        )

    @cached_property
    def _interchange(self) -> bool:
        here = {container.type for container in self.wanted.values()}
        there = {container.type for container in self.placed.containers.values()}
        return "fields" in here or ("fields" in there and "sequence" in here)

    @cached_property
    def _integers(self) -> bool:
        every = (*self.wanted.values(), *self.placed.containers.values())
        return any(told_apart(container) for container in every if container.type == "keys")

    def saved_key(self, key: str) -> str:
        """How the checkpoint spells a target key.

        Another way only where one side is a namedtuple and the other a sequence, or where one tells an
        integer key from a string.
        """
        if (
            (key in self.plain and not self._integers)
            or key == ROOT
            or not (self._interchange or self._integers)
        ):
            return key
        ours = theirs = ROOT
        for name in key.split("/"):
            integer = None
            if self._integers:
                integer = integer_spelling(self.wanted.get(ours), self.placed.containers.get(theirs), name)
            there = join(theirs, integer or name)
            if there not in self.plain and there not in self.above and there not in self.placed.containers:
                other = (
                    None
                    if integer
                    else other_spelling(self.wanted.get(ours), self.placed.containers.get(theirs), name)
                )
                there = join(theirs, other) if other is not None else there
            ours, theirs = join(ours, name), there
        return theirs


def ancestors(key: str) -> Iterator[str]:
    """The keys above a key, the nearest first, the root last."""
    end = key.rfind("/")
    while end > 0:
        yield key[:end]
        end = key.rfind("/", 0, end)
    if key != ROOT:
        yield ROOT


def absent(names: Names, index: int, leaf: Leaf) -> Finding | None:
    """What the checkpoint has in the name of a leaf outside optimizers, if it does not have the leaf."""
    key = names.saved_key(leaf.key)
    container = names.placed.containers.get(key)
    wanted = str(leaf.spec)
    if container is not None and container.type == "none":
        return Finding(index, leaf.key, "kind", "None", wanted, target=index)
    if container is not None or key in names.above:
        saved = _container(container, names.above.get(key))
        return Finding(index, leaf.key, "kind", saved, wanted, target=index)
    for upper, theirs in zip(ancestors(leaf.key), ancestors(key), strict=True):
        source = names.plain.get(theirs)
        found = names.placed.containers.get(theirs)
        below = f"a container (with {leaf.key!r})"
        if source is not None:
            saved = names.placed.leaves[source]
            assert saved is not None
            hint = f"fresh=({upper!r},) keeps the target's own"
            return Finding(index, upper, "kind", str(saved.spec), below, hint, source=source)
        if found is not None and found.type == "none":
            hint = f"fresh=({upper!r},) keeps the target's own"
            return Finding(index, upper, "kind", "None", below, hint)
        if theirs in names.above:
            break
    return None


def _seen(names: Names, key: str) -> str:
    return names.placed.origins.get(key, key)


def _container(container: Container | None, example: str | None) -> str:
    if container is not None and container.type == "none":
        return "None"
    if example is None:
        return "an empty container"
    return f"a container (with {example!r})"


def containers_differ(
    names: Names, *, fresh: Callable[[str], bool], consumed: Collection[int], attach: bool
) -> list[Finding]:
    """Problems of the target's None, empty containers and sequences.

    Args:
        names: both sides.
        fresh: whether the caller asked for the target's own at a key.
        consumed: saved leaves that transforms take.
        attach: whether a target's list may be shorter.
    """
    found: list[Finding] = []
    for key, container in names.wanted.items():
        if container.type in ("fields", "keys") or fresh(key):
            continue
        theirs = names.saved_key(key)
        saved = names.placed.containers.get(theirs)
        if container.type == "sequence":
            if not attach and saved is not None and saved.type == "sequence":
                found += _length(names, key, theirs, consumed)
            continue
        clash = _against_empty(names, container, theirs, saved)
        if clash:
            wanted = "None" if container.type == "none" else "an empty container"
            hint = f"rename={{{_seen(names, theirs)!r}: None}} leaves the saved one out"
            found.append(Finding(container.position, key, "kind", clash, wanted, hint))
    return found


def _against_empty(names: Names, container: Container, key: str, saved: Container | None) -> str:
    """What of the checkpoint cannot stand where the target has None or an empty container."""
    source = names.plain.get(key)
    leaf = None if source is None else names.placed.leaves[source]
    if leaf is not None:
        return str(leaf.spec)
    if container.type == "empty":
        # An empty container asks for nothing of a full one.
        return "None" if saved is not None and saved.type == "none" else ""
    if saved is not None and saved.type == "none":
        return ""
    return _container(saved, names.above.get(key)) if saved is not None or key in names.above else ""


def _length(names: Names, key: str, theirs: str, consumed: Collection[int]) -> list[Finding]:
    container, saved = names.wanted[key], names.placed.containers[theirs]
    size, full = len(container.names), len(saved.names)
    if size >= full:
        return []
    old = _seen(names, theirs)
    level = depth(old)
    left: list[str] = []
    items = _below_items(names.view.leaves, old)
    for index in range(size, full):
        item = join(old, str(index))
        hit = names.placed.renamer.find(item) if names.placed.renamer else None
        below = items.get(str(index), [])
        spoken = names.placed.spoken
        silent = [i for i in below if i not in consumed and spoken.get(i, 0) <= level]
        if not (hit is not None and hit.names > level) and (silent or not below):
            left.append(item)
    if not left:
        return []
    example = ", ".join(f"{item!r}: None" for item in left[:3]) + (", ..." if len(left) > 3 else "")
    hint = (
        "Equal shapes would let the wrong items in: say which saved items are left out or stand elsewhere, "
        f"as in rename={{{example}}}"
    )
    position = container.position
    return [Finding(position, key, "length", f"a sequence of {full}", f"a sequence of {size}", hint)]


def _below_items(leaves: Sequence[Leaf | None], key: str) -> dict[str, list[int]]:
    """Indices of the leaves below each item of a sequence."""
    prefix = anchored(key)[1:] + "/" if key != ROOT else ""
    items: dict[str, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if leaf is not None and leaf.variable is None and leaf.key.startswith(prefix):
            name = leaf.key[len(prefix) :].partition("/")[0]
            items.setdefault(name, []).append(index)
    return items
