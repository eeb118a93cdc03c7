"""Optimizer states to slots: names that do not depend on where a transform stands in its chain.

The rules are those of the documentation's page on optimizers. Pure: it sees the structure of a tree and
what its leaves are, not the tree.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from msgspec import Struct

from jaxckpt.graph.model import ROOT, LeafSpec, StateField, Structure, join, slot_key, spell
from jaxckpt.graph.optimizers.mirror import Matcher, Mirror, Pair
from jaxckpt.graph.optimizers.states import Collector, Field, Finder, OptimizerTree
from jaxckpt.graph.optimizers.tree import Tree, candidates, grow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: Labels may stand before the parameters' tree in a field: this many levels of dict.
_LABEL_DEPTH = 2


class Place(Struct, frozen=True, kw_only=True):
    """Where a leaf stands in the named graph.

    Attributes:
        key: its key.
        path: the plain edges that lead to it, or None for a slot, to which none do.
        state: its place inside an optimizer, or None.
        variable: for a slot, index of its variable's leaf.
        slot: for a slot with a variable, the slot's name.
        orphan: a slot whose variable is not in the tree.
    """

    key: str
    path: tuple[str, ...] | None
    state: StateField | None = None
    variable: int | None = None
    slot: str = ""
    orphan: bool = False


class Places(Struct, frozen=True, kw_only=True):
    """Where everything stands.

    Attributes:
        root: the tree, transparent containers folded.
        leaves: one for each leaf, in order.
        optimizers: the optimizers' trees, by their path.
        types: class names of the containers inside optimizers, by the path of plain edges to them.
    """

    root: Tree
    leaves: tuple[Place, ...]
    optimizers: Mapping[tuple[str, ...], Tree]
    types: Mapping[tuple[str, ...], str]


def place(
    structure: Structure,
    specs: Sequence[LeafSpec],
    of: Mapping[tuple[str, ...], str] | None = None,
    *,
    optimizers: bool = True,
) -> Places:
    """Names every leaf of a tree.

    Args:
        structure: the tree.
        specs: what its leaves are.
        of: the keys that `Optimizer` marks name, by the path of the mark.
        optimizers: False to look for none: every leaf is a plain variable.
    """
    root = grow(structure)
    places: dict[int, Place] = {}
    for tree in root.all_leaves():
        places[tree.leaf] = Place(key=tree.key, path=tree.path)
    types: dict[tuple[str, ...], str] = {}
    found: list[OptimizerTree] = []
    if optimizers:
        matcher = Matcher(specs)
        finder = Finder(root, matcher, of or {})
        found = finder.optimizers
        for optimizer in found:
            Collector(optimizer)
        _Assigner(root, matcher, finder.inside, found).assign()
        for optimizer in found:
            _name(optimizer, places, types)
    return Places(
        root=root,
        leaves=tuple(places[index] for index in range(len(places))),
        optimizers={optimizer.tree.path: optimizer.tree for optimizer in found},
        types=types,
    )


class _Assigner:
    """Decides which parameters the fields of all optimizers mirror."""

    def __init__(
        self, root: Tree, matcher: Matcher, inside: set[int], optimizers: Sequence[OptimizerTree]
    ) -> None:
        self._root = root
        self._matcher = matcher
        self._inside = inside
        self._optimizers = optimizers
        self._pool = candidates(root, lambda tree: id(tree) in inside)
        self._by_names: dict[frozenset[str], list[Tree]] = defaultdict(list)
        for tree in self._pool:
            self._by_names[tree.filled()].append(tree)

    def assign(self) -> None:
        for optimizer in self._optimizers:
            self._assign(optimizer)
        slots = {
            (part.state_class, part.name)
            for optimizer in self._optimizers
            for part in optimizer.fields
            if part.found and not part.tree.is_leaf
        }
        for optimizer in self._optimizers:
            compared = any(part.found for part in optimizer.fields)
            for part in optimizer.fields:
                if part.may_orphan and not part.found:
                    part.orphan = not compared or (part.state_class, part.name) in slots

    def _assign(self, optimizer: OptimizerTree) -> None:
        fields = [part for part in optimizer.fields if not part.values and part.name != "hyperparams"]
        trees = [part for part in fields if not part.tree.is_leaf]
        named = None if optimizer.of is None else self._named(optimizer.of)
        if optimizer.of is not None and named is None:
            return
        options = {id(part): self._options(part.tree, named) for part in trees}
        exact = {
            id(mirror.parameters)
            for choices in options.values()
            for _, mirrors in choices
            for mirror in mirrors[:1]
            if mirror.same and not mirror.loose
        }
        for part in trees:
            for labels, mirrors in options[id(part)]:
                agreed = (mirror for mirror in mirrors if id(mirror.parameters) in exact)
                best = mirrors[0]
                # Factored moments fit several trees equally badly: they go where the others do.
                chosen = best if best.same else next(agreed, best)
                part.found.append((labels, chosen))
        if not any(part.found for part in trees):
            self._assign_bare(fields, named)

    def _named(self, key: str) -> Tree | None:
        """The tree that an ``of=`` names, if it is there and no optimizer's."""
        tree: Tree | None = self._root
        for name in () if key in ("", ROOT) else key.split("/"):
            while tree is not None and name not in tree.children and "" in tree.children:
                tree = tree.children[""]
            tree = None if tree is None or id(tree) in self._inside else tree.children.get(name)
        return tree

    def _options(
        self, state: Tree, named: Tree | None, depth: int = 0
    ) -> list[tuple[tuple[str, ...], list[Mirror]]]:
        """The parameters that a tree may mirror, the best first; behind dict labels, for each label."""
        mirrors: list[tuple[tuple[bool, bool, int, int], Mirror]] = []
        for order, tree in enumerate(self._near(state, named)):
            found = self._matcher.mirror(state, tree)
            if found is not None:
                mirrors.append(((found.loose, not found.same, -found.score, order), found))
        if mirrors:
            mirrors.sort(key=lambda pair: pair[0])
            return [((), [mirror for _, mirror in mirrors])]
        if not state.is_dict or depth == _LABEL_DEPTH:
            return []
        options: list[tuple[tuple[str, ...], list[Mirror]]] = []
        for name, child in state.children.items():
            if child.leaves:
                below = [] if child.is_leaf else self._options(child, named, depth + 1)
                if not below:
                    return []  # the *whole* field mirrors parameters, or it does not
                options += [((name, *labels), found) for labels, found in below]
        return options

    def _near(self, state: Tree, named: Tree | None) -> Iterator[Tree]:
        """Trees that a state could mirror, by the names at its top."""
        filled = state.filled()
        if named is not None:
            yield from [named] if named.is_leaf else candidates(named, lambda tree: id(tree) in self._inside)
        elif len(filled) == len(state.children) and state.structure.type != "object":
            yield from self._by_names.get(filled, ())
        else:
            yield from (tree for tree in self._pool if filled <= tree.children.keys())

    def _assign_bare(self, fields: Sequence[Field], named: Tree | None) -> None:
        """Parameters that are one array: found by their shape among the root's edges, or named."""
        if named is not None:
            variables = [named] if named.is_leaf else []
        else:
            # Candidates are the trees outside of optimizers; those without a path are the root's.
            top = [child for tree in self._pool if not tree.path for child in tree.children.values()]
            variables = [tree for tree in top if tree.is_leaf and id(tree) not in self._inside]
        for part in fields:
            if part.tree.is_leaf and (named is not None or self._matcher.ndim(part.tree.leaf)):
                self._find_bare(part, variables)
        chosen = [mirror.parameters for part in fields for _, mirror in part.found][:1]
        for part in fields:
            if not part.tree.is_leaf and not part.found:
                mirrors = [self._matcher.mirror(part.tree, tree) for tree in chosen]
                part.found += [((), mirror) for mirror in mirrors if mirror is not None]

    def _find_bare(self, part: Field, variables: Sequence[Tree]) -> None:
        for tree in variables:
            if self._matcher.bare(part.tree.leaf, tree.leaf):
                mirror = Mirror(tree, [Pair(part.tree.leaf, tree.leaf, (), ())])
                part.found.append(((), mirror))
                return


def _name(optimizer: OptimizerTree, places: dict[int, Place], types: dict[tuple[str, ...], str]) -> None:
    """Spells the keys of an optimizer's leaves."""
    root = optimizer.tree
    #: Which fields of one name each variable has had so far: the second is spelled `mu.2`.
    seen: dict[tuple[int, str], list[tuple[object, ...]]] = defaultdict(list)
    for part in optimizer.fields:
        state = part.state_class if part.ordinal == 1 else f"{part.state_class}.{part.ordinal}"
        slots = {pair.slot: (labels, pair) for labels, mirror in part.found for pair in mirror.pairs}
        for leaf in part.tree.all_leaves():
            below = (*part.base, *leaf.path[len(part.tree.path) :])
            labels, pair = slots.get(leaf.leaf, ((), None))
            field = StateField(
                optimizer=root.key,
                state_class=part.state_class,
                ordinal=part.ordinal,
                field=part.name,
                labels=(*part.labels, *labels),
                path=below if pair is None else pair.path,
                suffix=() if pair is None else pair.suffix,
                is_slot=pair is not None or part.orphan,
            )
            path = (*root.path, state, part.name, *below)
            if pair is None:
                key = spell(path)
                places[leaf.leaf] = Place(
                    key=key, path=None if part.orphan else path, state=field, orphan=part.orphan
                )
                continue
            instances = seen[pair.variable, part.name]
            instance = (part.state_class, part.ordinal, part.base, labels)
            if instance not in instances:
                instances.append(instance)
            nth = instances.index(instance) + 1
            slot = join(part.name if nth == 1 else f"{part.name}.{nth}", *pair.suffix)
            key = slot_key(places[pair.variable].key, root.key, slot)
            places[leaf.leaf] = Place(key=key, path=None, state=field, variable=pair.variable, slot=slot)
        types[*root.path, state] = part.state_class
        for tree in part.tree.walk():
            types[*root.path, state, part.name, *part.base, *tree.path[len(part.tree.path) :]] = tree.cls
