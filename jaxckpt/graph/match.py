"""A saved graph against a target's: which saved leaf goes where, and every reason why one cannot.

Pure: names, shapes and dtypes only. What only values can tell is left to the restore, and marked in
each `Fill`: whether they fit (``cast``, ``exact``), whether several are equal (``equal``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace as replace_struct

from jaxckpt.errors import Problem, RestoreError
from jaxckpt.graph.matching.clash import Finding, Names, absent, containers_differ
from jaxckpt.graph.matching.compat import compare, is_inexact
from jaxckpt.graph.matching.hints import Hints
from jaxckpt.graph.matching.outcome import Fill as Fill
from jaxckpt.graph.matching.outcome import outcome
from jaxckpt.graph.matching.rehome import rehome
from jaxckpt.graph.matching.renames import place
from jaxckpt.graph.matching.transforms import Made, apply, carry
from jaxckpt.graph.matching.view import containers, look, optimizers_of
from jaxckpt.graph.matching.wishes import Wishes
from jaxckpt.graph.model import ArraySpec, Leaf, ObjectGraph
from jaxckpt.graph.optimizers.slot_match import match_states
from jaxckpt.graph.rules import Rules
from jaxckpt.graph.status import RestoreStatus

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_NOT_ASKED = Fill("not asked")
_MISSING = Fill("missing")
_FRESH = Fill("fresh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a restore will do.

    Attributes:
        fills: one for each leaf of the target, in order.
        status: what the restore will have done. Where ``problems`` is not empty it is a sketch, in which
            leaves that have a problem are ``missing`` (or ``ambiguous``).
        problems: all of them, in the target's order.
    """

    fills: tuple[Fill, ...]
    status: RestoreStatus
    problems: tuple[Problem, ...]
    _matcher: _Matcher = field(repr=False, compare=False)

    def check(self, source: str) -> None:
        """Raises one RestoreError with all problems, if there are any; ``source`` names the checkpoint."""
        if self.problems:
            count = len(self.problems)
            many = f"{count} problems" if count > 1 else "1 problem"
            raise RestoreError(
                f"{source} does not fit the target, nothing was restored: {many}", self.problems
            )

    def revise(self, *, unequal: Collection[int] = (), lost: Collection[int] = ()) -> Match:
        """The match after some values were looked at.

        Args:
            unequal: target indices of fills marked ``equal`` whose sources differ: they are ambiguous.
            lost: target indices of fills whose sources cannot be read: they are missing, without a problem.
        """
        fills = list(self.fills)
        problems = list(self.problems)
        for index in lost:
            fills[index] = _MISSING
        for index in unequal:
            fills[index] = Fill("ambiguous", self.fills[index].sources)
            if not self._matcher.wishes.partial(index):
                finding = self._matcher.unsure(index, self.fills[index].sources)
                problems.append(self._matcher.problem(finding))
        return replace(self, fills=tuple(fills), status=self._matcher.status(fills), problems=tuple(problems))


def match(saved: ObjectGraph, target: ObjectGraph, rules: Rules | None = None) -> Match:
    """Finds what each leaf of the target comes from.

    Args:
        saved: the checkpoint's graph.
        target: the target's.
        rules: the options of the restore.

    Raises:
        RestoreError: a rule is wrong in itself: it names nothing, or two things meet in one name. What is
            wrong with leaves does not raise here, see `Match.check`.
    """
    if rules is not None and rules != Rules():
        return _Matcher(saved, target, rules).run()
    # What restores the same into the same again and again finds it beside the graph.
    kept: Any = saved.__dict__
    last = kept.get("_match")
    if last is None or last[0] is not target:
        last = kept["_match"] = (target, _Matcher(saved, target, Rules()).run())
    return last[1]


class _Matcher:
    """One match. What its steps find out is kept, so that `Match.revise` can go on from it."""

    def __init__(self, saved: ObjectGraph, target: ObjectGraph, rules: Rules) -> None:
        self.saved = saved
        self.target = target
        self.rules = rules
        view = look(saved, rules.at)
        targets = optimizers_of(target)
        wanted = containers(target.structure, targets)
        self.wishes = Wishes(rules, target.leaves, wanted)
        found = containers(view.structure, view.optimizers)
        made = apply(rules, view.leaves, target.leaves)
        placed = place(view, rules, found, targets)
        moved = rehome(view.leaves, placed.leaves, {leaf.key for leaf in target.leaves}, made.values())
        if moved is not None:
            view = replace_struct(view, leaves=moved)
            made = apply(rules, view.leaves, target.leaves)
            placed = place(view, rules, found, targets)
        self.made: dict[int, Made] = {**made, **carry(made, view.leaves, placed.leaves, target.leaves)}
        self.names = Names(view=view, placed=placed, wanted=wanted)
        self.sources: dict[int, tuple[int, ...]] = {}
        self.ambiguous: dict[int, tuple[int, ...]] = {}
        self.findings: list[Finding] = []
        self.fills: list[Fill] = []
        self.hints: Hints | None = None
        # Pairs of specs that fit as they are, by identity: a graph has few, and keeps them.
        self.fitting: set[tuple[int, int]] = set()

    def run(self) -> Match:
        self._find()
        self.fills = [self._fill(index, leaf) for index, leaf in enumerate(self.target.leaves)]
        consumed = {item for made in self.made.values() for item in made.sources}
        self.findings += containers_differ(
            self.names, fresh=self.wishes.fresh_key, consumed=consumed, attach=self.rules.attach
        )
        problems = tuple(self.problem(finding) for finding in _one_each(self.findings))
        return Match(
            fills=tuple(self.fills), status=self.status(self.fills), problems=problems, _matcher=self
        )

    def _find(self) -> None:
        """Sources of all leaves: by a rule's spelled key, by name, by place in the optimizer."""
        leaves = self.names.placed.leaves
        pins, plain = self.names.placed.pins, self.names.plain
        inner: dict[int, Leaf] = {}
        renamed: dict[str, str] = {}
        for index, leaf in enumerate(self.target.leaves):
            if index in self.made or leaf.spec.kind == "skipped":
                continue
            if leaf.key in pins:
                self.sources[index] = (pins[leaf.key],)
            elif leaf.state is not None:
                inner[index] = leaf
            else:
                key = self.names.saved_key(leaf.key)
                if key in plain:
                    self.sources[index] = (plain[key],)
                if key != leaf.key:
                    renamed[leaf.key] = key
        states = {
            index: leaf for index, leaf in enumerate(leaves) if leaf is not None and leaf.state is not None
        }
        taken = {item for made in self.made.values() for item in made.sources}
        found = match_states(
            states,
            inner,
            fresh=self.wishes.fresh,
            renamed=renamed,
            taken=taken,
            ordained=self.names.placed.ordained,
        )
        self.sources.update(found.sources)
        self.ambiguous.update(found.ambiguous)
        self._by_spelling(states, renamed)

    def _by_spelling(self, states: Mapping[int, Leaf], renamed: Mapping[str, str]) -> None:
        """What is left, where one side knows optimizers and the other has only keys (a converted file)."""
        left = [
            (index, leaf)
            for index, leaf in enumerate(self.target.leaves)
            if index not in self.sources and index not in self.ambiguous and index not in self.made
        ]
        if not left:
            return
        spelled = {leaf.key: index for index, leaf in states.items()} | self.names.plain
        for index, leaf in left:
            source = spelled.get(renamed.get(leaf.key, leaf.key))
            # Two leaves that both know their place in an optimizer were compared by it already.
            if source is not None and leaf.kind != "skipped" and (leaf.state is None or source not in states):
                self.sources[index] = (source,)

    def _fill(self, index: int, leaf: Leaf) -> Fill:
        kind = leaf.spec.kind
        if kind == "skipped":
            return _NOT_ASKED
        if index in self.wishes.fresh:
            return _FRESH if kind != "callable" else _NOT_ASKED
        made = self.made.get(index)
        if made is not None:
            return self._transformed(index, leaf, made)
        unsure = self.ambiguous.get(index)
        if unsure is not None:
            if not self.wishes.partial(index):
                self.findings.append(self.unsure(index, unsure))
            return Fill("ambiguous", unsure)
        sources = self.sources.get(index)
        if sources is None:
            return self._absent(index, leaf)
        if len(sources) == 1 and (id(self.saved.leaves[sources[0]].spec), id(leaf.spec)) in self.fitting:
            return Fill("restored", sources)
        return self._compared(index, leaf, sources)

    def _compared(self, index: int, leaf: Leaf, sources: tuple[int, ...]) -> Fill:
        cast = exact = False
        function = leaf.spec.kind == "callable"
        for source in sources:
            other = self.saved.leaves[source].spec
            verdict = compare(other, leaf.spec, cast=False)
            if verdict.kind == "dtype" and self.wishes.cast(index):
                verdict = compare(other, leaf.spec, cast=True)
            if verdict.kind is not None:
                sides = (str(other), str(leaf.spec))
                self.findings.append(
                    Finding(index, leaf.key, verdict.kind, *sides, verdict.hint, index, source)
                )
                return _NOT_ASKED if function else _MISSING
            exact = exact or verdict.exact
            cast = (
                cast or verdict.cast or (verdict.exact and self.wishes.cast(index) and is_inexact(leaf.spec))
            )
        if function:
            return _NOT_ASKED
        if not (cast or exact) and len(sources) == 1 and isinstance(leaf.spec, ArraySpec):
            self.fitting.add((id(self.saved.leaves[sources[0]].spec), id(leaf.spec)))
        return Fill("restored", sources, cast=cast, exact=exact, equal=len(sources) > 1)

    def _transformed(self, index: int, leaf: Leaf, made: Made) -> Fill:
        if not made.sources:
            if not self.wishes.absent(index):
                hint = f"transform={made.rule} needs {made.lacking}; fresh=({leaf.key!r},) keeps the target's"
                self.findings.append(
                    Finding(index, leaf.key, "missing", "nothing", str(leaf.spec), hint, index)
                )
            return _MISSING
        for source in made.sources:
            other = self.saved.leaves[source].spec
            if other.kind not in ("array", "value") or leaf.kind not in ("array", "value"):
                hint = "A transform takes and makes arrays"
                self.findings.append(
                    Finding(index, leaf.key, "kind", str(other), str(leaf.spec), hint, index, source)
                )
                return _MISSING
        return Fill("restored", made.sources, made.function, made.indices)

    def _absent(self, index: int, leaf: Leaf) -> Fill:
        clash = absent(self.names, index, leaf) if leaf.state is None else None
        if clash is not None:
            self.findings.append(clash)
        elif leaf.kind == "callable":
            return _NOT_ASKED
        elif not self.wishes.absent(index):
            self.findings.append(Finding(index, leaf.key, "missing", "nothing", str(leaf.spec), "", index))
        return _MISSING if leaf.kind != "callable" else _NOT_ASKED

    def unsure(self, index: int, sources: tuple[int, ...]) -> Finding:
        """The finding that a leaf could be any of some saved ones."""
        leaf = self.target.leaves[index]
        keys = [self.saved.leaves[source].key for source in sources]
        first = self.names.view.leaves[sources[0]]
        container = ""
        if first is not None and first.state is not None and leaf.state is not None:
            old, new = first.state, leaf.state
            container = (
                f"rename={{'{old.optimizer}/{old.state_class}.{old.ordinal}': "
                f"'{new.optimizer}/{new.state_class}.{new.ordinal}'}} says which is which (None drops one); "
            )
        hint = f"{container}fresh=({leaf.key!r},) or partial=({leaf.key!r},) keeps the target's own"
        return Finding(index, leaf.key, "ambiguous", " or ".join(keys), str(leaf.spec), hint, index)

    def problem(self, finding: Finding) -> Problem:
        """A finding with its hint."""
        if self.hints is None:
            used = {item for fill in self.fills if fill.why == "restored" for item in fill.sources}
            lost = {index for index, fill in enumerate(self.fills) if fill.why == "missing"}
            self.hints = Hints(
                seen=self.names.view.leaves,
                placed=self.names.placed.leaves,
                target=self.target.leaves,
                used=used,
                lost=lost,
            )
        return self.hints.complete(finding)

    def status(self, fills: list[Fill]) -> RestoreStatus:
        """The status for some fills."""
        return outcome(
            self.saved.leaves,
            self.names.view.leaves,
            self.target.leaves,
            fills,
            skip_slots=self.rules.skip_slots,
        )


def _one_each(findings: list[Finding]) -> list[Finding]:
    """In the target's order, one for each key."""
    found: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda finding: finding.position):
        found.setdefault(finding.key, finding)
    return list(found.values())
