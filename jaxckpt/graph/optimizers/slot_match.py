"""Which saved leaf of an optimizer belongs to which of the target's.

A slot goes by its variable, a variable of a state (a count, a hyperparameter) by its name, both by
optimizer, state class and field, never by the place in a chain. Several of one name (two ``trace``
stages) go by their labels and, if there are as many on both sides, in order of appearance. What
none of this decides is ambiguous: it is reported and never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from jaxckpt.graph.model import ArraySpec, Leaf, LeafSpec, StateField, ValueSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence


class Pairing(NamedTuple):
    """Pairs of (target index, saved indices), and target indices that could be any of some saved ones.

    Several saved indices for one target: scalars, right only if all are equal.
    """

    pairs: list[tuple[int, tuple[int, ...]]]
    ambiguous: list[tuple[int, tuple[int, ...]]]


@dataclass(slots=True, kw_only=True)
class StateMatch:
    """What `match_states` found, by target index. Filled by it alone."""

    sources: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    ambiguous: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])

    def take(self, pairing: Pairing) -> None:
        self.sources.update(pairing.pairs)
        self.ambiguous.update(pairing.ambiguous)

    def used(self) -> set[int]:
        """Saved indices that are spoken for."""
        found = {index for items in self.sources.values() for index in items}
        return found.union(*self.ambiguous.values())


def match_states(
    saved: Mapping[int, Leaf],
    wanted: Mapping[int, Leaf],
    *,
    fresh: Collection[int],
    renamed: Mapping[str, str],
    taken: Collection[int] = (),
    ordained: Collection[int] = (),
) -> StateMatch:
    """Matches leaves of optimizers.

    Args:
        saved: leaves inside optimizers as the rules name them, by index.
        wanted: the target's leaves inside optimizers, by index.
        fresh: target indices that take nothing, but count where the numbers agree with them.
        renamed: target keys of variables that were found under another saved key.
        ordained: saved indices of which a rule says which state of their class they are.
        taken: saved indices that transforms take: they are not looked for by their path.
    """
    result = StateMatch()
    found = _group(saved, lambda leaf: _identity(leaf, {}))
    for identity, targets in _group(wanted, lambda leaf: _identity(leaf, renamed)).items():
        sources = found.get(identity)
        if sources is not None:
            result.take(pair(wanted, saved, targets, sources, fresh, ordained))
    left = {i: leaf for i, leaf in wanted.items() if i not in result.sources and i not in result.ambiguous}
    if left:
        used = result.used().union(taken)
        _by_path(result, {i: leaf for i, leaf in saved.items() if i not in used}, left, fresh, ordained)
    _keep_together(result, saved, wanted, found, fresh, ordained)
    return result


def _keep_together(
    result: StateMatch,
    saved: Mapping[int, Leaf],
    wanted: Mapping[int, Leaf],
    found: Mapping[Hashable, Sequence[int]],
    fresh: Collection[int],
    ordained: Collection[int],
) -> None:
    """What several states could give goes where the slots of its own state went: a count to its moments."""
    origins: dict[Hashable, set[Hashable]] = {}
    for i, sources in result.sources.items():
        if _state(wanted[i]).is_slot and len(sources) == 1:
            origins.setdefault(_which(wanted[i]), set()).add(_which(saved[sources[0]]))
    for i, leaf in wanted.items():
        states = origins.get(_which(leaf))
        if i in fresh or not states:
            continue
        is_slot = _state(leaf).is_slot
        sources = result.ambiguous.get(i, ()) if is_slot else found.get(_identity(leaf, {}), ())
        if len(sources) < 2 or any(j in ordained for j in sources):
            continue
        own = tuple(j for j in sources if _which(saved[j]) in states)
        if len(own) == 1 or (own and _all_scalars([leaf.spec, *(saved[j].spec for j in own)])):
            result.sources[i] = own
            result.ambiguous.pop(i, None)


def _which(leaf: Leaf) -> Hashable:
    state = _state(leaf)
    return (state.optimizer, state.state_class, state.ordinal)


def _by_path(
    result: StateMatch,
    saved: Mapping[int, Leaf],
    wanted: Mapping[int, Leaf],
    fresh: Collection[int],
    ordained: Collection[int],
) -> None:
    """What is left goes by its path below the subtree that the state mirrors, if that is unique."""
    found = _group(saved, _path_identity)
    for identity, targets in _group(wanted, _path_identity).items():
        sources = found.get(identity)
        if sources is None:
            continue
        if len({wanted[i].variable for i in targets}) == 1 == len({saved[i].variable for i in sources}):
            result.take(pair(wanted, saved, targets, sources, fresh, ordained))
        else:
            result.take(Pairing([], [(i, tuple(sources)) for i in targets if i not in fresh]))


def _group(leaves: Mapping[int, Leaf], name: Callable[[Leaf], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, leaf in leaves.items():
        groups.setdefault(name(leaf), []).append(index)
    return groups


def _identity(leaf: Leaf, renamed: Mapping[str, str]) -> Hashable:
    state = _state(leaf)
    variable = leaf.variable
    if variable is None:
        return (state.optimizer, state.state_class, state.field, state.path, state.suffix, state.is_slot)
    return (state.optimizer, state.state_class, state.field, state.suffix, renamed.get(variable, variable))


def _path_identity(leaf: Leaf) -> Hashable:
    state = _state(leaf)
    return (state.optimizer, state.state_class, state.field, *state.path, *state.suffix)


def _state(leaf: Leaf) -> StateField:
    assert leaf.state is not None
    return leaf.state


def pair(
    wanted: Mapping[int, Leaf],
    saved: Mapping[int, Leaf],
    targets: Sequence[int],
    sources: Sequence[int],
    fresh: Collection[int] = (),
    ordained: Collection[int] = (),
) -> Pairing:
    """Pairs the leaves of one name.

    Args:
        wanted: the target's leaves by index.
        saved: the saved leaves by index.
        targets: target indices of that name, at least one.
        sources: saved indices of that name, at least one.
        fresh: target indices that take nothing.
        ordained: saved indices that belong to the state of their own number and to no other.
    """
    said = {_state(saved[j]).ordinal: j for j in sources if j in ordained} if ordained else {}
    if said:
        fixed = [(i, (said[n],)) for i in targets if (n := _state(wanted[i]).ordinal) in said]
        done = {i for i, _ in fixed}
        targets = [i for i in targets if i not in done]
        sources = [j for j in sources if j not in ordained]
        other = pair(wanted, saved, targets, sources, fresh) if targets and sources else Pairing([], [])
        return Pairing(fixed + other.pairs, other.ambiguous)
    if len(targets) == 1 == len(sources):
        return Pairing([(targets[0], (sources[0],))], [])
    targets = sorted(targets, key=lambda i: (_state(wanted[i]).ordinal, i))
    sources = sorted(sources, key=lambda i: (_state(saved[i]).ordinal, i))
    if len(targets) != len(sources):
        # The user took some out: they need not be told apart from the others.
        targets = [i for i in targets if i not in fresh]
    pairs: list[tuple[int, int]] = []
    rest = _by_labels(wanted, saved, targets, sources, pairs)
    if len(targets) == len(sources):
        pairs.extend(zip(*rest, strict=True))
        return Pairing([(i, (j,)) for i, j in pairs], [])
    open_targets, open_sources = rest
    if _all_scalars(saved[j].spec for j in open_sources) and _all_scalars(
        wanted[i].spec for i in open_targets
    ):
        # One count for each part of a partition; several for one if they turn out to be equal.
        every = tuple(open_sources)
        each = [(i, every) for i in open_targets] if every else []
        return Pairing([(i, (j,)) for i, j in pairs] + each, [])
    open_targets, open_sources = _by_spec(wanted, saved, open_targets, open_sources, pairs)
    unsure = [(i, tuple(open_sources)) for i in open_targets] if open_sources else []
    return Pairing([(i, (j,)) for i, j in pairs], unsure)


def _by_labels(
    wanted: Mapping[int, Leaf],
    saved: Mapping[int, Leaf],
    targets: Sequence[int],
    sources: Sequence[int],
    pairs: list[tuple[int, int]],
) -> tuple[list[int], list[int]]:
    """Pairs labels that stand as often on both sides; gives back what is left."""
    return _take_equal(
        lambda i: _state(wanted[i]).labels,
        lambda j: _state(saved[j]).labels,
        targets,
        sources,
        pairs,
        single=False,
    )


def _by_spec(
    wanted: Mapping[int, Leaf],
    saved: Mapping[int, Leaf],
    targets: Sequence[int],
    sources: Sequence[int],
    pairs: list[tuple[int, int]],
) -> tuple[list[int], list[int]]:
    """Pairs dtypes and shapes that stand once on each side; gives back what is left."""
    return _take_equal(
        lambda i: _form(wanted[i].spec), lambda j: _form(saved[j].spec), targets, sources, pairs, single=True
    )


def _take_equal(
    want: Callable[[int], Hashable],
    have: Callable[[int], Hashable],
    targets: Sequence[int],
    sources: Sequence[int],
    pairs: list[tuple[int, int]],
    *,
    single: bool,
) -> tuple[list[int], list[int]]:
    groups: dict[Hashable, tuple[list[int], list[int]]] = {}
    for i in targets:
        groups.setdefault(want(i), ([], []))[0].append(i)
    for j in sources:
        groups.setdefault(have(j), ([], []))[1].append(j)
    for ours, theirs in groups.values():
        if len(ours) == len(theirs) and not (single and len(ours) > 1):
            pairs.extend(zip(ours, theirs, strict=True))
    done = {i for i, _ in pairs}
    gone = {j for _, j in pairs}
    return [i for i in targets if i not in done], [j for j in sources if j not in gone]


def _form(spec: LeafSpec) -> Hashable:
    if isinstance(spec, ArraySpec):
        return (spec.shape, spec.dtype, spec.impl)
    return spec.type if isinstance(spec, ValueSpec) else spec.kind


def _all_scalars(specs: Iterable[LeafSpec]) -> bool:
    """Numbers without a dimension. A PRNG key is none: two noises must not come from one key."""
    return all(
        isinstance(spec, ValueSpec) or (isinstance(spec, ArraySpec) and not spec.shape and spec.impl is None)
        for spec in specs
    )


def carried(
    wanted: Mapping[int, Leaf],
    saved: Mapping[int, Leaf],
    slots: Iterable[int],
    variables: Sequence[str],
    by_variable: Mapping[str, Sequence[int]],
) -> dict[int, tuple[int, ...] | None]:
    """The saved slots that a transform of saved ``variables`` makes each of a target variable's ``slots`` of.

    None stands for a slot that has not exactly one counterpart for each variable.

    Args:
        wanted: the target's leaves by index.
        saved: the saved leaves by index.
        slots: target indices of the slots of one variable.
        variables: saved keys of the variables, in the order in which the function takes them.
        by_variable: saved indices of the slots of each variable.
    """
    groups = _group({i: wanted[i] for i in slots}, _slot_kind)
    found: dict[int, tuple[int, ...] | None] = {}
    columns = [_group({j: saved[j] for j in by_variable.get(name, ())}, _slot_kind) for name in variables]
    for kind, targets in groups.items():
        chosen: dict[int, list[int]] = {i: [] for i in targets}
        for column in columns:
            sources = column.get(kind)
            if sources:
                for i, items in pair(wanted, saved, targets, sources).pairs:
                    chosen[i].extend(items if len(items) == 1 else ())
        for i, items in chosen.items():
            found[i] = tuple(items) if len(items) == len(columns) else None
    return found


def _slot_kind(leaf: Leaf) -> Hashable:
    state = _state(leaf)
    return (state.optimizer, state.state_class, state.field, state.suffix)
