"""A tree in Orbax's spelling: which path and which storage key Orbax gives to each place. Pure.

Orbax flattens the real pytree with JAX's key paths and writes each step down as a string with one of two
types (`orbax/checkpoint/_src/metadata/tree.py`, `_src/tree/utils.py`, 0.12.8): a position in a sequence (also
a child of a custom node without keys), or a name (a dict's key through `str`, an attribute, a field). The
storage key is the path joined by dots.
"""

from __future__ import annotations

import base64

from jaxckpt.graph.model import ArraySpec, Frozen, Leaf, Name, ObjectGraph, Structure, ValueSpec
from jaxckpt.storage.format.dtypes import ORBAX_DTYPES

SEQUENCE, DICT = 1, 2
#: What an empty container is called in ``_METADATA``; of any other kind of node "None".
_EMPTY = {
    **dict.fromkeys(("dict", "OrderedDict", "defaultdict", "FrozenDict"), "Dict"),
    "list": "List",
    "tuple": "Tuple",
}
_MAX_RANK = 32  # tensorstore's


class Place(Frozen, frozen=True, kw_only=True):
    """A place of the tree that ``_METADATA`` lists.

    Attributes:
        names: the path, each step as Orbax spells it.
        types: `SEQUENCE` or `DICT` for each step.
        leaf: index of the leaf that Orbax can restore there, or -1 where it gets `type` instead.
        type: "np.ndarray", "scalar" or "string"; "Dict", "List", "Tuple" or "None" where nothing is read.
    """

    names: tuple[str, ...]
    types: tuple[int, ...]
    leaf: int
    type: str

    @property
    def key(self) -> str:
        """The storage key."""
        return ".".join(self.names)


def places(graph: ObjectGraph) -> tuple[Place, ...]:
    """Everything that Orbax sees of a tree, in the tree's order.

    A leaf that Orbax or tensorstore cannot hold is absent, and so is the later one of two places of the same
    spelling. Only a sequence may not have holes, or Orbax opens nothing at all: an item of one of which
    nothing is visible reads "None".
    """
    taken: set[str] = set()
    found: list[Place] = []
    stack: list[tuple[tuple[str, ...], tuple[int, ...], Structure | int]] = [((), (), graph.structure)]
    while stack:
        names, types, structure = stack.pop()
        if isinstance(structure, int):  # an item of a sequence ends; so many places came before it
            if len(found) == structure:
                found.append(Place(names=names, types=types, leaf=-1, type="None"))
            continue
        if types and types[-1] == SEQUENCE:
            stack.append((names, types, len(found)))
        if structure.children:
            stack.extend(reversed(_children(names, types, structure)))
            continue
        place = _place(names, types, structure, graph.leaves, taken)
        if place is not None:
            found.append(place)
    return tuple(found)


def _children(
    names: tuple[str, ...], types: tuple[int, ...], structure: Structure
) -> list[tuple[tuple[str, ...], tuple[int, ...], Structure | int]]:
    """The children with their paths; of two of one spelling (1 and "1") only the first."""
    children: dict[str, tuple[tuple[str, ...], tuple[int, ...], Structure | int]] = {}
    for name, child in zip(structure.names, structure.children, strict=True):
        text, kind = orbax_name(name)
        children.setdefault(text, ((*names, text), (*types, kind), child))
    return list(children.values())


def orbax_name(name: Name) -> tuple[str, int]:
    """A step as Orbax spells it, with its type."""
    match name.type:
        case "index":
            return name.text, SEQUENCE
        case "float":
            return str(float.fromhex(name.text)), DICT
        case "bytes":
            return str(base64.b64decode(name.text)), DICT
        case "none":
            return "None", DICT
        case _:
            return name.text, DICT


def _place(
    names: tuple[str, ...],
    types: tuple[int, ...],
    structure: Structure,
    leaves: tuple[Leaf, ...],
    taken: set[str],
) -> Place | None:
    key = ".".join(names)
    if not _is_text(key):
        return None
    if structure.leaf < 0:
        return Place(names=names, types=types, leaf=-1, type=_EMPTY.get(structure.type, "None"))
    kind = _type(leaves[structure.leaf], key)
    # A slash at the end is the one that tensorstore adds: 'a/' and 'a' are one array. What begins with our
    # own directory would meet the leaves that Orbax cannot see.
    if kind is None or key in taken or key.endswith("/") or key.startswith(".jaxckpt/"):
        return None
    taken.add(key)
    return Place(names=names, types=types, leaf=structure.leaf, type=kind)


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type(leaf: Leaf, key: str) -> str | None:
    """How Orbax reads a leaf, or None if it cannot."""
    spec = leaf.spec
    if isinstance(spec, ArraySpec):
        fits = spec.dtype in ORBAX_DTYPES and len(spec.stored_shape) <= _MAX_RANK
        # Everything is "np.ndarray": that opens on any devices and keeps 64 bits. A "jax.Array" without a
        # target asks for the devices it was saved on.
        return "np.ndarray" if fits else None
    if not isinstance(spec, ValueSpec) or not fits_orbax(spec):
        return None
    if spec.type != "str":
        return "scalar"
    # The strings' file is read through a JSON pointer, in which `/` and `~` mean something.
    return "string" if "/" not in key and "~" not in key else None


def fits_orbax(spec: ValueSpec) -> bool:
    """Whether Orbax can hold a Python value, where its key is one that Orbax can read."""
    value = spec.value
    if spec.type == "str":
        return isinstance(value, str) and _is_text(value)
    if spec.type == "int":
        return isinstance(value, int) and -(1 << 63) <= value < 1 << 64
    return spec.type in ("float", "bool", "complex")
