"""The documents inside ``graph.json``, as msgspec reads and writes them. Pure.

What there are thousands of is rows (JSON arrays), the rest objects. Unknown fields and rows of another length
are refused. A text with a lone surrogate, which JSON in UTF-8 cannot hold, makes its whole graph `escaped`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from jaxckpt.graph.model import ArrayType, Edge, Node, Slot, StructureType, ValueSpec, ValueType

# Integers above this many bits are written in hexadecimal: Python refuses to turn more than 4300 decimal
# digits into an integer, because that takes quadratic time.
_DECIMAL_BITS = 12_000


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A JSON object of known fields; those with their default are left out."""


class ShardingDoc(Strict, frozen=True, gc=False):
    """`jaxckpt.graph.model.Sharding`."""

    mesh: list[tuple[str, int]] = []
    spec: list[list[str]] = []
    shard_shape: list[int] = []
    memory_kind: str | None = None


class ArrayDoc(Strict, frozen=True, gc=False, tag_field="kind", tag="array"):
    """`ArraySpec`."""

    shape: list[int]
    dtype: str
    array_type: ArrayType = "jax"
    weak_type: bool = False
    ref: bool = False
    impl: str | None = None
    key_shape: list[int] = []
    sharding: ShardingDoc | None = None


class ValueDoc(Strict, frozen=True, gc=False, tag_field="kind", tag="value"):
    """`ValueSpec`; without `value` it lies in the database."""

    type: ValueType
    value: str | None = None


class IteratorDoc(Strict, frozen=True, gc=False, tag_field="kind", tag="iterator"):
    """`IteratorSpec`; its state is one of the graph's `graphs`."""

    state: int | None = None


class CallableDoc(Strict, frozen=True, gc=False, tag_field="kind", tag="callable"):
    """`CallableSpec`."""

    name: str


class SkippedDoc(Strict, frozen=True, gc=False, tag_field="kind", tag="skipped"):
    """`SkippedSpec`."""


SpecDoc = ArrayDoc | ValueDoc | IteratorDoc | CallableDoc | SkippedDoc


class StateDoc(Strict, frozen=True, gc=False):
    """`StateField`."""

    optimizer: str
    state_class: str
    ordinal: int
    field: str
    labels: list[str] = []
    path: list[str] = []
    suffix: list[str] = []
    is_slot: bool = False


#: key, node, index into `specs`, index into `states` or -1, variable or None
LeafRow = tuple[str, int, int, int, str | None]
#: type, class, static, number of children, and for each child [name, type] or [name, type, text]
StructureRow = tuple[StructureType, str, bool, int, list[tuple[str, ...]]]


class GraphDoc(Strict, frozen=True, gc=False):
    """`ObjectGraph`. `structure` is in preorder, a leaf being the index of it."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    slots: tuple[Slot, ...]
    leaves: list[LeafRow]
    structure: list[int | StructureRow]
    specs: list[SpecDoc]
    states: list[StateDoc] = []
    left_out: int = 0
    escaped: bool = False


class EntryDoc(Strict, frozen=True, gc=False):
    """`layout.Entry` with its digest; dtype and shape are those of its leaf, `bytes` of a string."""

    owner: tuple[int, ...]
    key: str
    digest: str
    chunk_shape: tuple[int, ...]
    aliases: tuple[int, ...] = ()
    alias_keys: tuple[str, ...] = ()
    bytes: int | None = None
    raw: bool = False
    visible: bool = True


class SavedDoc(Strict, frozen=True, gc=False):
    """The deterministic part of a manifest: the tree's graph is the first of `graphs`."""

    graphs: list[GraphDoc]
    entries: list[EntryDoc]
    metadata: Any = None


class FilesDoc(Strict, frozen=True, gc=False):
    """`manifest.Files`."""

    sequence: int
    started: float
    committed: float
    step: int | None = None
    save_counter: int | None = None
    writer: str = "hand"
    name: str = ""
    version: str = ""
    metrics: Any = None
    tables: dict[str, str] = {}
    others: dict[str, tuple[int, str]] = {}
    nbytes: int = 0
    nbytes_shared: int = 0


# Python values as texts


def value_text(spec: ValueSpec) -> str | None:
    """A Python value as exact text; None for one that lies in the database."""
    value: Any = spec.value
    if value is None:
        return None
    match spec.type:
        case "bool":
            return "true" if value else "false"
        case "int":
            number = int(value)
            return str(number) if number.bit_length() <= _DECIMAL_BITS else hex(number)
        case "float":
            return float(value).hex()
        case "complex":
            return f"{value.real.hex()} {value.imag.hex()}"
        case "bytes":
            return base64.b64encode(value).decode("ascii")
        case "str":
            return str(value)


def text_value(type_: ValueType, text: str) -> Any:
    """The inverse of `value_text`.

    Raises:
        ValueError: the text is none of a value of that type.
    """
    match type_:
        case "bool":
            if text not in ("true", "false"):
                raise ValueError("neither true nor false")
            return text == "true"
        case "int":
            if not re.fullmatch(r"-?(?:\d{1,4000}|0x[0-9a-f]+)", text):
                raise ValueError("no integer")
            return int(text, 16 if "x" in text else 10)
        case "float":
            return float.fromhex(text)
        case "complex":
            real, imag = text.split(" ")
            return complex(float.fromhex(real), float.fromhex(imag))
        case "bytes":
            return base64.b64decode(text.encode("ascii"), validate=True)
        case "str":
            return text


# Texts that JSON cannot hold

_SURROGATE = re.compile("[\ud800-\udfff\\\\]")
_ESCAPED = re.compile(r"\\(?:\\|u[0-9a-f]{4})")


def escape_text(text: str) -> str:
    r"""Lone surrogates as ``\udXXX``, a backslash doubled."""
    return _SURROGATE.sub(lambda m: r"\\" if m[0] == "\\" else f"\\u{ord(m[0]):04x}", text)


def unescape_text(text: str) -> str:
    """The inverse of `escape_text`."""
    return _ESCAPED.sub(lambda m: "\\" if m[0] == r"\\" else chr(int(m[0][2:], 16)), text)


def plain_text(text: str) -> str:
    """The text itself, for graphs that are not escaped."""
    return text


def spelled_nodes(nodes: Iterable[Node], text: Callable[[str], str]) -> tuple[Node, ...]:
    """Nodes with each text of theirs put through a function."""
    return tuple(Node(key=text(node.key), kind=node.kind, type=text(node.type)) for node in nodes)


def spelled_edges(edges: Iterable[Edge], text: Callable[[str], str]) -> tuple[Edge, ...]:
    """The same for edges."""
    return tuple(Edge(parent=edge.parent, name=text(edge.name), child=edge.child) for edge in edges)


def spelled_slots(slots: Iterable[Slot], text: Callable[[str], str]) -> tuple[Slot, ...]:
    """The same for slots."""
    return tuple(
        Slot(optimizer=text(s.optimizer), variable=text(s.variable), name=text(s.name), key=text(s.key))
        for s in slots
    )
