"""What the caller asks for each leaf of the target: to stay fresh, to be absent, to change its width."""

from __future__ import annotations

import difflib
from functools import cached_property
from typing import TYPE_CHECKING

from jaxckpt.errors import RestoreError
from jaxckpt.graph.matching.patterns import Pattern, anchored, covering
from jaxckpt.graph.matching.view import Container, state_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxckpt.graph.model import Leaf
    from jaxckpt.graph.rules import Rules


class Wishes:
    """The target's side of `Rules`, by leaf index.

    A pattern names a slot by its key, and by its place in the optimizer (`state_key`), so that
    ``opt/**`` covers the optimizer's slots, whose keys begin with their variables'.
    """

    def __init__(self, rules: Rules, leaves: Sequence[Leaf], containers: Mapping[str, Container]) -> None:
        """Raises RestoreError if a pattern names nothing: a typo must not pass in silence."""
        self.rules = rules
        self.leaves = leaves
        self._containers = containers
        for option in ("fresh", "partial", "cast"):
            patterns: bool | tuple[Pattern, ...] = getattr(rules, option)
            if not isinstance(patterns, bool) and not rules.attach:
                self._check(option, patterns)
        self.fresh = self._fresh()
        self._partial = self._covered(rules.partial)
        self._cast = self._covered(rules.cast)

    def partial(self, index: int) -> bool:
        """Whether the leaf may keep the target's value for want of a saved one."""
        return self._partial is None or index in self._partial

    def absent(self, index: int) -> bool:
        """Whether the leaf may be absent from the checkpoint."""
        return self.rules.attach or self.partial(index)

    def cast(self, index: int) -> bool:
        """Whether the leaf's value may be converted to another width."""
        return self._cast is None or index in self._cast

    def fresh_key(self, key: str) -> bool:
        """Whether the caller asked for the target's own at a container."""
        pattern = covering(self.rules.fresh)
        return pattern is not None and pattern.match(anchored(key)) is not None

    @cached_property
    def _keys(self) -> list[tuple[str, ...]]:
        """Each leaf's names, anchored."""
        return [
            (anchored(leaf.key),)
            if leaf.state is None or leaf.variable is None
            else (anchored(leaf.key), anchored(state_key(leaf.state)))
            for leaf in self.leaves
        ]

    def _covered(self, patterns: bool | tuple[Pattern, ...]) -> set[int] | None:
        """Indices of the leaves that the patterns name; None stands for all."""
        if patterns is True:
            return None
        pattern = covering(patterns or ())
        if pattern is None:
            return set()
        return {index for index, keys in enumerate(self._keys) if any(pattern.match(key) for key in keys)}

    def _fresh(self) -> set[int]:
        fresh = self._covered(self.rules.fresh) or set()
        if self.rules.skip_slots:
            states = [(index, leaf.state) for index, leaf in enumerate(self.leaves) if leaf.state is not None]
            classes = {(state.optimizer, state.state_class) for _, state in states if state.is_slot}
            # Adam's count goes with its moments: zero moments with an old count make too large a step.
            fresh |= {index for index, state in states if (state.optimizer, state.state_class) in classes}
        return fresh

    def _check(self, option: str, patterns: tuple[Pattern, ...]) -> None:
        for pattern in patterns:
            if set(pattern.text) <= {"*", "/", "."}:
                continue  # all there is, which may be nothing
            if any(pattern.regex.match(key) for keys in self._keys for key in keys):
                continue
            if any(pattern.covers(key) for key in self._containers):
                continue
            known = [leaf.key for leaf in self.leaves][:1000]
            close = difflib.get_close_matches(pattern.text, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RestoreError(f"{option}: {pattern.text!r} names nothing in the target{hint}")
