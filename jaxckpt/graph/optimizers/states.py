"""Where the optimizers of a tree are, and the states inside them with their fields."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxckpt.graph.optimizers.mirror import Matcher, Mirror
from jaxckpt.graph.optimizers.tree import Tree, candidates

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: The marks' class names, as in `jaxckpt.graph.marks` (which imports jax; this module is pure).
OPTIMIZER, VALUES = "jaxckpt.graph.marks:Optimizer", "jaxckpt.graph.marks:Values"

#: Fields of optax's states with containers that mirror no parameters.
_NO_SLOTS = frozenset(("hyperparams", "measurement", "measurements"))

Verdict = Literal["state", "open", "foreign", "nothing", "other"]


@dataclass(slots=True, eq=False)
class Field:
    """A field of a state, or what a nested container of one holds beside further states.

    Attributes:
        state_class: class name of the state.
        ordinal: which of the optimizer's states of that class, from 1.
        name: the field's name, escaped.
        labels: dict keys on the way to the state.
        tree: what the field holds.
        base: path from the field to `tree`.
        values: a `Values` mark stands around it: it holds no slots.
        found: the parameters that it mirrors, each with further labels.
        orphan: it holds slots of parameters that are not in the tree.
    """

    state_class: str
    ordinal: int
    name: str
    labels: tuple[str, ...]
    tree: Tree
    base: tuple[str, ...] = ()
    values: bool = False
    found: list[tuple[tuple[str, ...], Mirror]] = field(default_factory=list[tuple[tuple[str, ...], Mirror]])
    orphan: bool = False

    @property
    def nested(self) -> bool:
        """Whether the field is one for states of its own (`inner_state`, `inner_states`)."""
        return self.name.endswith(("state", "states"))

    @property
    def may_orphan(self) -> bool:
        """Whether it counts as slots when there are no parameters to compare with."""
        return not (self.values or self.tree.is_leaf or self.nested or self.name in _NO_SLOTS)


@dataclass(slots=True, eq=False)
class OptimizerTree:
    """An optimizer.

    Attributes:
        tree: its outermost subtree.
        marked: whether the user marked it.
        of: the key that its mark names, if any.
        fields: of its states, in JAX's order.
    """

    tree: Tree
    marked: bool = False
    of: str | None = None
    fields: list[Field] = field(default_factory=list[Field])


def _is_foreign(tree: Tree) -> bool:
    return tree.may_be_state and not tree.is_optax


def verdict(tree: Tree) -> Verdict:
    """What a tree is by the classes of its containers alone.

    "state" and "open" hold a state of optax, and nothing but states; "open" also NamedTuples from
    elsewhere ("foreign"), which may be states or a program's own parameters.
    """
    if tree.is_optax:
        return "state"
    if tree.structure.type == "none":
        return "nothing"
    if _is_foreign(tree):
        return "foreign"
    if tree.structure.type not in ("tuple", "OrderedDict"):
        return "other"
    parts = {"other" if child.marks else verdict(child) for child in tree.children.values()}
    if "other" in parts:
        return "other"
    if not parts & {"state", "open"}:
        return "foreign" if "foreign" in parts else "nothing"
    return "open" if parts & {"foreign", "open"} else "state"


class Finder:
    """Looks for the optimizers of a tree."""

    def __init__(self, root: Tree, matcher: Matcher, of: Mapping[tuple[str, ...], str]) -> None:
        self._matcher = matcher
        self._of = of
        self._open: list[Tree] = []
        self.optimizers: list[OptimizerTree] = []
        self.inside: set[int] = set()
        self._root = root
        self._scan(root)
        while self._open:
            # All are judged by what is certain now: one that turns out to hold parameters says nothing
            # of another.
            judged = [(tree, self._is_chain(tree)) for tree in self._open]
            self._open = []
            for tree, chain in judged:
                if chain:
                    self._add(OptimizerTree(tree))
                else:
                    for child in tree.children.values():
                        self._scan(child)
        self.optimizers.sort(
            key=lambda optimizer: next((leaf.leaf for leaf in optimizer.tree.all_leaves()), -1)
        )

    def _add(self, optimizer: OptimizerTree) -> None:
        self.optimizers.append(optimizer)
        self.inside.add(id(optimizer.tree))

    def _scan(self, tree: Tree) -> None:
        mark = next((mark for mark in tree.marks if mark in (OPTIMIZER, VALUES)), None)
        if mark == VALUES:
            return
        if mark == OPTIMIZER:
            self._add(OptimizerTree(tree, marked=True, of=self._of.get(tree.path)))
            return
        match verdict(tree):
            case "state":
                self._add(OptimizerTree(tree))
            case "open":
                self._open.append(tree)
            case _:
                for child in tree.children.values():
                    self._scan(child)

    def _is_chain(self, tree: Tree) -> bool:
        """Whether the NamedTuples from elsewhere in a tuple with states are states, too.

        ``(Params(w, b), opt_state)`` and ``chain(adam(), mine())`` have the same classes. What the
        states of optax mirror tells them apart.
        """
        foreign, mirrors = _foreign_parts(tree), list(_containers(tree))
        if any(part.structure.cls == mirror.structure.cls for part, _ in foreign for mirror in mirrors):
            return False  # the states mirror this very class: it holds the parameters
        closed = {id(each) for each in self._open} | self.inside
        outside = candidates(self._root, lambda part: id(part) in closed)
        if self._mirrored(mirrors, outside):
            return True
        if self._mirrored(mirrors, [sub for part, _ in foreign for sub in part.walk()]):
            return False
        fields = [child for part, _ in foreign for child in part.children.values()]
        return bool(mirrors) or all(beside for _, beside in foreign) or self._mirrored(fields, outside)

    def _mirrored(self, states: Sequence[Tree], parameters: Sequence[Tree]) -> bool:
        for state in states:
            for tree in parameters:
                found = None if tree.is_leaf or state.is_leaf else self._matcher.mirror(state, tree)
                if found is not None and not found.loose:
                    return True
        return False


def _foreign_parts(tree: Tree) -> list[tuple[Tree, bool]]:
    """The NamedTuples from elsewhere in a chain, and whether a state of optax stands beside each."""
    if tree.structure.type not in ("tuple", "OrderedDict"):
        return []
    beside = any(child.is_optax for child in tree.children.values())
    found: list[tuple[Tree, bool]] = []
    for child in tree.children.values():
        found += [(child, beside)] if _is_foreign(child) else _foreign_parts(child)
    return found


def _containers(tree: Tree) -> Iterator[Tree]:
    """What the states of optax in a chain hold for parameters."""
    for part in tree.walk():
        if part.is_optax:
            for name, child in part.children.items():
                if child.leaves and not child.is_leaf and name not in _NO_SLOTS and not child.has_state:
                    yield child


class Collector:
    """Lists the states inside one optimizer: chains and wrappers dissolved, dict keys kept as labels."""

    def __init__(self, optimizer: OptimizerTree) -> None:
        self._fields = optimizer.fields
        self._ordinals: Counter[str] = Counter()
        self._collect(optimizer.tree, ())

    def _collect(self, tree: Tree, labels: tuple[str, ...]) -> None:
        """Goes through a tree that stands where a state does."""
        if _is_statelike(tree):
            if tree.structure.type == "namedtuple":
                self._state(tree, labels)
                return
            for name, child in tree.children.items():
                self._collect(child, (*labels, name) if tree.is_dict else labels)
        elif tree.is_leaf:
            self._fields.append(Field("state", self._next("state"), "value", labels, tree))
        elif tree.is_dict and all(child.has_state for child in tree.children.values() if child.leaves):
            for name, child in tree.children.items():
                self._collect(child, (*labels, name))
        else:
            self._state(tree, labels)

    def _next(self, name: str) -> int:
        self._ordinals[name] += 1
        return self._ordinals[name]

    def _state(self, tree: Tree, labels: tuple[str, ...]) -> None:
        ordinal = self._next(tree.cls)
        for name, child in tree.children.items():
            self._content(Field(tree.cls, ordinal, name, labels, child, values=VALUES in child.marks))

    def _content(self, part: Field) -> None:
        """Takes a field's tree apart until it holds no further states."""
        tree = part.tree
        if not part.values and (tree.is_optax or (part.nested and _is_statelike(tree))):
            self._collect(tree, part.labels)
        elif not part.values and tree.has_state:
            for name, child in tree.children.items():
                labels = (*part.labels, name) if tree.is_dict else part.labels
                base, values = (*part.base, name), VALUES in child.marks
                self._content(Field(part.state_class, part.ordinal, part.name, labels, child, base, values))
        elif tree.leaves:
            self._fields.append(part)


def _is_statelike(tree: Tree) -> bool:
    """Whether a tree where a state stands is made of NamedTuples: chains of them, or one."""
    if tree.structure.type == "namedtuple":
        return tree.may_be_state
    if not tree.leaves:
        return tree.structure.type in ("tuple", "OrderedDict", "none")
    if tree.structure.type in ("tuple", "OrderedDict", "dict"):
        kinds = [_is_statelike(child) and not child.marks for child in tree.children.values()]
        if tree.structure.type == "tuple":
            return all(kinds)
        return all(kinds) and all(child.has_state for child in tree.children.values() if child.leaves)
    return False
