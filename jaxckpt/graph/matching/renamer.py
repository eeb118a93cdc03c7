"""Looking up what the rules of ``rename=`` make of a saved key."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from msgspec.structs import replace

from jaxckpt.graph.matching.patterns import anchored, depth, plain
from jaxckpt.graph.matching.view import state_container, state_key
from jaxckpt.graph.model import ROOT, StateField, join

if TYPE_CHECKING:
    from jaxckpt.graph.rules import Rules


class Hit(NamedTuple):
    """What a rule makes of a key: the new one (None: dropped) and how many names of the old one it names."""

    key: str | None
    names: int
    rule: int = -1


class Renamer:
    """Looks the most specific rule up: the longest prefix, then the one without stars, then the first."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules.renames
        self.function = rules.rename_function
        self.used: set[int] = set()
        self._literal = {r.source.key: i for i, r in enumerate(self.rules) if not r.source.stars}
        self._starred = [i for i, r in enumerate(self.rules) if r.source.stars]
        self._called: dict[str, str | None] = {}
        self.marked = any(rule.source.marked for rule in self.rules)
        self._moved: dict[str, Hit | None] = {}
        self._fields: dict[tuple[str, str, int, str], tuple[bool, Hit | None]] = {}

    def __bool__(self) -> bool:
        return bool(self.rules) or self.function is not None

    def find(self, key: str, *, marked: bool = False) -> Hit | None:
        """The new key of something saved, or None if no rule speaks about it.

        Args:
            key: a saved key.
            marked: whether only rules that spell a slot's key count.
        """
        if self.function is not None:
            return None if marked else self._by_function(key)
        best = self._by_prefix(key)
        for index in self._starred:
            rule = self.rules[index]
            found = rule.source.find(key)
            if found is not None and (best is None or found.names > best.names):
                target = rule.target
                new = None if target is None else target.fill(rule.source, found.stars, found.rest)
                best = Hit(new, found.names, index)
        if best is None or (marked and not self.rules[best.rule].source.marked):
            return None
        self.used.add(best.rule)
        return best

    def again(self, key: str) -> Hit | None:
        """The same for a key that is asked for often: a variable with many slots."""
        if key not in self._moved:
            self._moved[key] = self.find(key)
        return self._moved[key]

    def _slots(self, state: StateField) -> Hit | None:
        """What rules without stars make of a slot: the same for all of its field, unless one names a slot."""
        place = (state.optimizer, state.state_class, state.ordinal, state.field)
        if place not in self._fields:
            field = join(state_container(state), state.field)
            named = any(key.startswith(field + "/") for key in self._literal)
            self._fields[place] = (named, None if named else self.find(field))
        named, hit = self._fields[place]
        if named:
            return self.find(state_key(state))
        if hit is None or hit.key is None:
            return hit
        return Hit(join(hit.key, *state.path, *state.suffix), hit.names, hit.rule)

    def ordains(self, hit: Hit, state: StateField) -> bool:
        """Whether the rule says which of the states of a class it means."""
        return hit.rule >= 0 and hit.names > depth(state.optimizer) and self.rules[hit.rule].numbered

    def _by_prefix(self, key: str) -> Hit | None:
        text = anchored(key)
        end = len(text)
        while self._literal:
            index = self._literal.get(plain(text[:end]))
            if index is not None:
                rule = self.rules[index]
                new = None if rule.target is None else rule.target.fill(rule.source, (), text[end:])
                return Hit(new, text.count("/", 0, end), index)
            if end <= 0:
                return None
            end = text.rfind("/", 0, end)
        return None

    def _by_function(self, key: str) -> Hit | None:
        """The function speaks about the leaf, else about the nearest container above it that it changes."""
        text = anchored(key)
        end = len(text)
        while end > 0 or text == "":
            old = plain(text[:end])
            new = self._call(old)
            if new is None:
                return Hit(None, depth(old))
            if new != old:
                return Hit(plain(anchored(new) + text[end:]), depth(old))
            if end <= 0:
                return None
            end = text.rfind("/", 0, end)
        return None

    def _call(self, key: str) -> str | None:
        assert self.function is not None
        if key not in self._called:
            new = cast("object", self.function(key))
            if new is not None and not isinstance(new, str):
                raise TypeError(f"rename: the function gives {new!r} for {key!r}; a key or None is wanted")
            self._called[key] = None if new is None else new.strip("/") or ROOT
        return self._called[key]

    def state(self, state: StateField) -> Hit | None:
        """What the rules make of a leaf's place in its optimizer (`state_key`)."""
        if self.function is not None:
            if not state.is_slot:
                return self.find(state_key(state))
            # A slot is no variable, so the function is asked about the state that it is in.
            hit = self.find(state_container(state))
            if hit is None or hit.key is None:
                return hit
            return hit._replace(key=join(hit.key, state.field, *state.path, *state.suffix))
        by_field = state.is_slot and not self._starred
        hit = self._slots(state) if by_field else self.find(state_key(state))
        inner = depth(state.optimizer) + 1
        if state.ordinal == 1 or (hit is not None and hit.names >= inner):
            return hit
        # A rule for a class, or for slots of it, without a number moves all its states, each with its own.
        reach = (inner, inner + 1) if state.is_slot else (inner,)
        every = replace(state, ordinal=1)
        found = self.find(state_key(every))
        if found is None or found.names not in reach or self.rules[found.rule].source.first:
            return hit
        if found.key is None:
            return found
        names = found.key.split("/")
        place = len(names) - (depth(state_key(state)) - inner) - 1
        if place < 0 or numbered(names[place])[1] > 1:
            return hit
        names[place] += f".{state.ordinal}"
        return Hit("/".join(names), found.names, found.rule)


def numbered(name: str) -> tuple[str, int]:
    """A state's name as class and ordinal: a single dot only ever stands before a number."""
    head, dot, number = name.rpartition(".")
    if dot and number.isdecimal() and not head.endswith("."):
        return head, int(number)
    return name, 1
