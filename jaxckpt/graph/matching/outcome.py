"""What a match comes to: where each leaf of the target gets its value, and the status that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from jaxckpt.graph.matching.transforms import Assemble
from jaxckpt.graph.model import Leaf, ValueSpec
from jaxckpt.graph.status import RestoreStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

Why = Literal["restored", "missing", "fresh", "ambiguous", "not asked"]


class Fill(Struct, frozen=True):
    """Where the value of one target leaf comes from.

    Attributes:
        why: "restored", else the target's own is kept: "missing", "fresh", "ambiguous", or "not asked" (a
            function of the program, a ``...``).
        sources: saved leaf indices in the order in which ``function`` takes them; () unless restored, and
            for an ambiguous leaf those that it could be.
        function: of a transform: takes the host arrays of ``sources`` and gives the value, whose shape
            and dtype are the target's or it is refused.
        indices: of a transform that scatters: what the target's stars stood for (``function`` has it).
        cast: the value is converted to another width of its kind; integers must fit.
        exact: a Python value goes into an array: it must be exactly representable there.
        equal: all of ``sources`` must be equal, else the leaf is ambiguous (`Match.revise`).
    """

    why: Why
    sources: tuple[int, ...] = ()
    function: Assemble | None = None
    indices: tuple[str, ...] | None = None
    cast: bool = False
    exact: bool = False
    equal: bool = False


def outcome(
    saved: Sequence[Leaf],
    seen: Sequence[Leaf | None],
    target: Sequence[Leaf],
    fills: Sequence[Fill],
    *,
    skip_slots: bool,
) -> RestoreStatus:
    """The status of a restore.

    Args:
        saved: the checkpoint's leaves.
        seen: the same as seen from where the target is matched, None outside.
        target: the target's leaves.
        fills: one for each of these.
        skip_slots: whether slots, and what belongs to them, were not asked for.
    """
    keys: dict[Why, list[str]] = {"missing": [], "fresh": [], "ambiguous": []}
    restored: dict[str, tuple[str, ...]] = {}
    candidates: dict[str, tuple[str, ...]] = {}
    cast: list[str] = []
    replaced: dict[str, tuple[object, object]] = {}
    used: set[int] = set()
    for leaf, fill in zip(target, fills, strict=True):
        if fill.why == "restored":
            sources = fill.sources
            restored[leaf.key] = tuple([saved[source].key for source in sources])
            used.update(sources)
            if fill.cast:
                cast.append(leaf.key)
            if isinstance(leaf.spec, ValueSpec):
                _note_replaced(replaced, leaf, saved[fill.sources[0]])
        elif fill.why != "not asked":
            keys[fill.why].append(leaf.key)
            if fill.why == "ambiguous":
                candidates[leaf.key] = tuple(saved[source].key for source in fill.sources)
    unused, excused, slots = _unused(saved, seen, used, candidates, skip_slots=skip_slots)
    return RestoreStatus(
        restored=restored,
        missing=tuple(keys["missing"]),
        fresh=tuple(keys["fresh"]),
        ambiguous=tuple(keys["ambiguous"]),
        cast=tuple(cast),
        candidates=candidates,
        replaced=replaced,
        unused=unused,
        excused=excused,
        slots_unused=slots,
    )


def _unused(
    leaves: Sequence[Leaf],
    seen: Sequence[Leaf | None],
    used: set[int],
    candidates: dict[str, tuple[str, ...]],
    *,
    skip_slots: bool,
) -> tuple[tuple[str, ...], frozenset[str], tuple[str, ...]]:
    """Saved keys that went nowhere, those of them that need not, those of them that are slots."""
    unsure = {key for items in candidates.values() for key in items if key in candidates}
    left = [
        index
        for index, leaf in enumerate(seen)
        if leaf is not None
        and index not in used
        and leaf.spec.kind != "callable"
        and leaves[index].key not in unsure
    ]
    if not left:
        return (), frozenset(), ()
    nodes = {leaves[index].node for index in used}
    states = {(s.optimizer, s.state_class) for leaf in leaves if (s := leaf.state) is not None and s.is_slot}
    excused: set[str] = set()
    for index in left:
        leaf = leaves[index]
        state = leaf.state
        skipped = skip_slots and state is not None and (state.optimizer, state.state_class) in states
        if leaf.node in nodes or skipped or leaf.key == "save_counter":
            excused.add(leaf.key)
    slots = tuple([leaves[i].key for i in left if (state := leaves[i].state) is not None and state.is_slot])
    return tuple([leaves[i].key for i in left]), frozenset(excused), slots


def _note_replaced(replaced: dict[str, tuple[object, object]], leaf: Leaf, source: Leaf) -> None:
    if isinstance(leaf.spec, ValueSpec) and isinstance(source.spec, ValueSpec):
        old, new = leaf.spec.value, source.spec.value
        # By their spelling: nan is nan, and -0.0 is not 0.0.
        if old is not None and new is not None and repr(old) != repr(new):
            replaced[leaf.key] = (old, new)
