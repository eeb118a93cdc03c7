"""A hashable stand-in for a treedef: equal for equal structures, and it keeps no array alive.

A treedef holds the auxiliary data of its containers: functions, modules, whole optimizers, and what
their closures captured. As the key of a cache it would keep all that alive. Here such objects are
referred to weakly, and a treedef itself is kept only where its data is plain (names, numbers, classes).
"""

from __future__ import annotations

import enum
import types
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from jaxckpt.graph.model import Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

#: Treedefs known to hold plain data only, in order of use; the cheap case of a known structure.
_plain: OrderedDict[Any, None] = OrderedDict()
_MAX_PLAIN = 256
#: Smaller ones are cheaper to look through than to remember.
_MIN_LEAVES = 16

_ATOMS = (type(None), str, bytes, type(...), Structure)


class _UnknownError(Exception):
    """The structure cannot be told from another: it must not be cached."""


def signature(treedef: Any) -> Hashable | None:
    """A key for what depends on the structure only, or None if there is none."""
    try:
        key = _of(treedef)
        hash(key)
    except Exception:  # hashing and comparing run code of the classes in there: one that fails is no key
        return None
    return key


def _of(treedef: Any) -> Hashable:
    if treedef in _plain:
        if len(_plain) == _MAX_PLAIN:  # else none is dropped next
            _plain.move_to_end(treedef)
        return treedef
    data = treedef.node_data()
    if data is None:
        return None
    cls, aux = data
    children = tuple(map(_of, treedef.children()))
    frozen, plain = _freeze(aux)
    if plain and all(child is None or type(child) is type(treedef) for child in children):
        if treedef.num_leaves >= _MIN_LEAVES:
            _plain[treedef] = None
            if len(_plain) > _MAX_PLAIN:
                _plain.popitem(last=False)
        return treedef
    return (cls, frozen, children)


def _freeze(data: Any) -> tuple[Hashable, bool]:
    """Auxiliary data as a key, and whether it is plain."""
    cls: type = type(data)
    if cls in _ATOMS or isinstance(data, (type, enum.Enum)):
        return (cls, data), True
    if isinstance(data, (int, float, complex)):
        # Never plain: treedefs with the keys 1, 1.0 and True compare equal, and are spelled otherwise.
        return (cls, repr(data)), False
    if isinstance(data, (tuple, list, frozenset, set)):
        unordered = isinstance(data, (frozenset, set))
        parts = [_freeze(part) for part in data]
        keys = [key for key, _ in parts]
        return (cls, frozenset(keys) if unordered else tuple(keys)), all(plain for _, plain in parts)
    if isinstance(data, (dict, types.MappingProxyType)):
        pairs = [(_freeze(key), _freeze(value)) for key, value in data.items()]
        key = (cls, tuple((key[0], value[0]) for key, value in pairs))
        return key, all(key[1] and value[1] for key, value in pairs)
    if isinstance(data, types.MethodType):
        return (cls, weakref.WeakMethod(data)), False
    try:
        return (cls, _weakref(data)), False
    except TypeError:
        raise _UnknownError from None


_weakref: Callable[[Any], Hashable] = weakref.ref
