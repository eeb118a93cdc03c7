"""The named graph of values that a checkpoint is. Plain frozen data: no jax, no I/O.

Terms: a *leaf* is one position of the tree, with one key. A *node* is what is there: one array
that stands at two positions is one node with two leaves. A *slot* is the dotted edge from an
optimizer and a variable to what the optimizer keeps for it.

The escaping of names is TensorFlow's (``tensorflow/python/checkpoint/trackable_view.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import ClassVar, Literal

from msgspec import Struct

#: The key of a tree that is a single leaf. No edge name is spelled so.
ROOT = "."
#: The name between a variable's key and the optimizer's in the key of a slot.
SLOT_MARK = ".OPTIMIZER_SLOT"


def escape(name: str) -> str:
    """An edge name as it stands in a key: ``.`` is ``..``, ``/`` is ``.S``, the empty name is ``.E``."""
    if not name:
        return ".E"
    return name.replace(".", "..").replace("/", ".S")


def join(*parts: str) -> str:
    """Joins keys that are already spelled; `ROOT` and the empty key add nothing."""
    return "/".join(part for part in parts if part and part != ROOT) or ROOT


def spell(names: Iterable[str]) -> str:
    """The key of a path of *escaped* names: the one spelling that files, errors and pictures use."""
    return "/".join(names) or ROOT


def slot_key(variable: str, optimizer: str, name: str) -> str:
    """The key of a slot: ``<variable>/.OPTIMIZER_SLOT/<optimizer>/<name>``."""
    return join(variable, SLOT_MARK, optimizer, name)


class Frozen(Struct, frozen=True, gc=False):
    """Base of the model: never changed, and without cycles, so that no garbage collector need look at it.

    (A frozen dataclass does the same in a millisecond for each class and some microseconds for each of the
    25,000 values of a graph of 5000 leaves. What is `array_like` is a row of the manifest as it is.)
    """


ArrayType = Literal["jax", "numpy", "scalar", "key"]
ValueType = Literal["int", "float", "complex", "bool", "str", "bytes"]
LeafKind = Literal["array", "value", "iterator", "callable", "skipped"]


class Sharding(Frozen, frozen=True, kw_only=True):
    """A sharding as plain data.

    Attributes:
        mesh: names and sizes of the mesh axes, in order; empty for a single device.
        spec: for each dimension the mesh axes that it is split over.
        shard_shape: shape of one shard.
        memory_kind: "device", "pinned_host", ... or None where the backend has but one.
    """

    mesh: tuple[tuple[str, int], ...] = ()
    spec: tuple[tuple[str, ...], ...] = ()
    shard_shape: tuple[int, ...] = ()
    memory_kind: str | None = None


class ArraySpec(Frozen, frozen=True, kw_only=True):
    """What an array leaf is.

    Attributes:
        shape: the array's shape; of a typed PRNG key array the logical one.
        dtype: the dtype's name ("float32", "bfloat16", "int4"), or numpy's ``dtype.str`` where a name
            does not say all ("<U5", ">f4", "<M8[ns]"); "uint32" (or what its bits are) for keys.
        array_type: "jax" for a `jax.Array` or abstract array, "numpy" for an ndarray, "scalar" for a
            numpy scalar, "key" for a typed PRNG key array.
        weak_type: whether JAX promotes it like a Python scalar.
        ref: whether it was held in a `jax.Ref`.
        impl: name of the PRNG implementation of a "key", else None.
        key_shape: shape of the bits of one key, else ().
        sharding: how it was laid out, or None for numpy and for one default device.
        abstract: a target's leaf that has a shape and no values (`jax.ShapeDtypeStruct`).
    """

    shape: tuple[int, ...]
    dtype: str
    array_type: ArrayType = "jax"
    weak_type: bool = False
    ref: bool = False
    impl: str | None = None
    key_shape: tuple[int, ...] = ()
    sharding: Sharding | None = None
    abstract: bool = False

    kind: ClassVar[LeafKind] = "array"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the array on disk: with the bits of the keys as trailing dimensions."""
        return self.shape + self.key_shape

    def __str__(self) -> str:
        dtype = f"key<{self.impl}>" if self.impl else self.dtype
        return f"{dtype}[{', '.join(map(str, self.shape))}]"


class ValueSpec(Frozen, frozen=True, kw_only=True):
    """A Python value: its type and the value itself (None while it lies in the database)."""

    type: ValueType
    value: int | float | complex | bool | str | bytes | None = None

    kind: ClassVar[LeafKind] = "value"

    def __str__(self) -> str:
        return f"a Python {self.type}"


class IteratorSpec(Frozen, frozen=True, kw_only=True):
    """The state of an iterator: a graph of its own, whose leaves are stored beside those of the tree.

    Attributes:
        state: the graph of the state; its keys are relative to the iterator.
    """

    state: ObjectGraph | None = None

    kind: ClassVar[LeafKind] = "iterator"

    def __str__(self) -> str:
        return "an iterator's state"


class CallableSpec(Frozen, frozen=True, kw_only=True):
    """A function among the leaves: program, not state. Only its qualified name is kept."""

    name: str

    kind: ClassVar[LeafKind] = "callable"

    def __str__(self) -> str:
        return f"the function {self.name}"


class SkippedSpec(Frozen, frozen=True, kw_only=True):
    """A leaf without a value: a slot left out of a save, or ``...`` in a target."""

    kind: ClassVar[LeafKind] = "skipped"

    def __str__(self) -> str:
        return "nothing"


LeafSpec = ArraySpec | ValueSpec | IteratorSpec | CallableSpec | SkippedSpec


class StateField(Frozen, frozen=True, kw_only=True):
    """Where a leaf stands inside an optimizer, independent of the chain around it.

    Attributes:
        optimizer: key of the optimizer.
        state_class: name of the state's class ("ScaleByAdamState").
        ordinal: which of the optimizer's states of that class, in order of appearance, from 1.
        field: the state's field ("mu").
        labels: dict keys met on the way to the state (of a partition, a named chain) and, for slots,
            before the parameters' tree; escaped.
        path: for a slot the parameter's path relative to the subtree that the state mirrors; for any
            other leaf its path below the field; escaped names.
        suffix: for a slot the names that follow the parameter's path (SM3 keeps a list for each).
        is_slot: whether the field holds one value for each parameter.
    """

    optimizer: str
    state_class: str
    ordinal: int
    field: str
    labels: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    is_slot: bool = False


class Leaf(Frozen, frozen=True, kw_only=True):
    """One position of the tree.

    Attributes:
        key: its key.
        node: index of its node in `ObjectGraph.nodes`.
        spec: what stands there.
        state: its place inside an optimizer, or None outside.
        variable: for a slot whose variable is in the same tree, the variable's key, else None.
    """

    key: str
    node: int
    spec: LeafSpec
    state: StateField | None = None
    variable: str | None = None

    @property
    def kind(self) -> LeafKind:
        return self.spec.kind


NodeKind = Literal["container", "optimizer", "variable", "slot", "value", "iterator", "callable"]


class Node(Frozen, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A container, an optimizer, a variable, a slot variable or a value.

    Attributes:
        key: the shortest of its keys; ties go to edge order.
        kind: which of those it is.
        type: class name of a container, else what its leaf's spec says.
    """

    key: str
    kind: NodeKind
    type: str


class Edge(Frozen, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A named edge between two nodes (indices)."""

    parent: int
    name: str
    child: int


class Slot(Frozen, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """The dotted edge: what an optimizer keeps for a variable. All four are keys or names.

    Attributes:
        optimizer: key of the optimizer.
        variable: key of the variable (the name of it that the slot belongs to).
        name: the slot's name ("mu"; "mu.2" for the second of that name).
        key: key of the slot variable.
    """

    optimizer: str
    variable: str
    name: str
    key: str


KeyType = Literal["str", "int", "float", "bool", "none", "bytes", "attr", "index", "repr"]


class Name(Frozen, frozen=True, kw_only=True):
    """One step of a path: the escaped name and the typed key behind it.

    Attributes:
        name: as it stands in keys; empty when the step is not spelled at all (a transparent box).
        type: "index" into a sequence, "attr" of an object or field of a namedtuple, else the type of a
            dict's key; "repr" for a key of a type that cannot be told from its text.
        text: the key as text: an index or integer in decimal, a float as `float.hex`, bytes in base64.
    """

    name: str
    type: KeyType
    text: str


StructureType = Literal[
    "leaf",
    "none",
    "dict",
    "OrderedDict",
    "defaultdict",
    "list",
    "tuple",
    "FrozenDict",
    "namedtuple",
    "object",
]


class Structure(Frozen, frozen=True, kw_only=True):
    """The pytree as plain data, enough to build it again where its class allows that.

    Attributes:
        type: which kind of container, or "leaf".
        cls: qualified class name ("module:qualname") of a namedtuple or other object; for a defaultdict
            the name of its factory ("list", "dict", "int", "float" or "").
        names: one for each child.
        children: in the order in which the class flattens.
        leaf: index into `ObjectGraph.leaves` for a "leaf", else -1.
        static: whether the object has static fields (its treedef carries auxiliary data), so that it
            can only be shown, not built again.
    """

    type: StructureType
    cls: str = ""
    names: tuple[Name, ...] = ()
    children: tuple[Structure, ...] = ()
    leaf: int = -1
    static: bool = False


class ObjectGraph(Struct, frozen=True, kw_only=True, dict=True):
    """A checkpoint's named graph.

    Attributes:
        nodes: in breadth-first order from the root, which is node 0.
        edges: in the order of their parents.
        slots: in the order of their leaves.
        leaves: every position of the tree, in the order in which JAX flattens it.
        structure: the tree itself.
        left_out: how many slots have no variable in this tree, so that a save leaves them out.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    slots: tuple[Slot, ...]
    leaves: tuple[Leaf, ...]
    structure: Structure
    left_out: int = 0

    @cached_property
    def by_key(self) -> dict[str, int]:
        """Index into `leaves` for each key."""
        return {leaf.key: index for index, leaf in enumerate(self.leaves)}

    def walk(self) -> Iterator[tuple[tuple[Name, ...], Structure]]:
        """Every structure of the tree with its path, parents first."""
        stack: list[tuple[tuple[Name, ...], Structure]] = [((), self.structure)]
        while stack:
            path, structure = stack.pop()
            yield path, structure
            pairs = zip(structure.names, structure.children, strict=True)
            stack.extend(reversed([((*path, name), child) for name, child in pairs]))

    def __str__(self) -> str:
        from jaxckpt.graph.text import draw  # text is drawn from graphs, so it imports this module

        return draw(self)
