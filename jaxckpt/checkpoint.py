"""`Checkpoint`: named edges around whatever is to be saved, in the spelling of TensorFlow's guide."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from jaxckpt.graph.model import Structure
from jaxckpt.graph.pytree.boxes import CHECKPOINT
from jaxckpt.graph.pytree.walk import child_names
from jaxckpt.graph.rebuild import known_classes
from jaxckpt.numbered import save_numbered
from jaxckpt.restored import Restored
from jaxckpt.restoring import restore
from jaxckpt.saving import save


@jax.tree_util.register_pytree_with_keys_class
class Checkpoint:
    """A frozen pytree whose edges are its attributes.

    ``Checkpoint(net=params, step=3)`` has the edges ``net`` and ``step``; ``Checkpoint(tree, step=3)``
    adds an edge to those that the tree has of its own. Edges are in sorted order.

    Args:
        root: a pytree whose own edges come first, or None for none.
        **edges: the named edges.

    Raises:
        ValueError: an edge has the name of a method, is called ``save_counter``, or exists in ``root``.
    """

    __slots__ = ("_edges", "_root")

    _edges: dict[str, Any]
    _root: Any

    def __init__(self, root: Any = None, /, **edges: Any) -> None:
        for name in edges:
            if name == "save_counter" or name in _RESERVED:
                raise ValueError(
                    f"{name!r} cannot be the name of an edge: Checkpoint.{name} means something else. Rename"
                    f" it, or save a plain dict: jaxckpt.save(path, {{{name!r}: ...}})"
                )
        taken = {} if root is None else dict.fromkeys(child_names(root))
        for name in edges:
            if name in taken:
                raise ValueError(
                    f"Cannot create a Checkpoint with keyword argument {name} if root.{name} already exists."
                )
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_edges", dict(sorted(edges.items())))

    def __getattr__(self, name: str) -> Any:
        if name in ("_edges", "_root"):  # not yet set: unpickling and copying look here first
            raise AttributeError(name)
        if name in self._edges:
            return self._edges[name]
        if isinstance(self._root, Mapping) and name in self._root:
            return self._root[name]
        if self._root is not None and hasattr(self._root, name):
            return getattr(self._root, name)
        raise AttributeError(
            f"this Checkpoint has no edge {name!r}; it has {', '.join(self._edges) or 'none'}"
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Checkpoint is frozen: use .replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a Checkpoint is frozen: make a new one without that edge")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._root, self._edges)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return bool(self._edges == other._edges and self._root == other._root)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # holds arrays, which are not hashable

    def __repr__(self) -> str:
        edges = [f"{name}={type(value).__name__}" for name, value in self._edges.items()]
        root = [] if self._root is None else [type(self._root).__name__]
        return f"Checkpoint({', '.join([*root, *edges])})"

    def replace(self, **edges: Any) -> Self:
        """A copy in which these edges have other values; new names are added."""
        own = {name: edges.pop(name) for name in child_names(self._root) if name in edges}
        root = self._root
        if own and isinstance(root, Mapping):
            root = type(root)({**root, **own})  # pyright: ignore[reportCallIssue]
        elif own:
            raise ValueError(
                f"{', '.join(own)}: an edge of the root, a {type(root).__name__}: replace it there"
            )
        return type(self)(root, **{**self._edges, **edges})

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """The root first, when there is one, under the key that names are made without."""
        children = [(jax.tree_util.GetAttrKey(name), value) for name, value in self._edges.items()]
        if self._root is not None:
            children.insert(0, (jax.tree_util.GetAttrKey("_root"), self._root))
        return children, (("",) if self._root is not None else ()) + tuple(self._edges)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> Self:
        """The reverse of `tree_flatten_with_keys`; checks nothing, as JAX puts its own objects in places."""
        result = object.__new__(cls)
        edges = dict(zip(names, children, strict=True))
        object.__setattr__(result, "_root", edges.pop("", None))
        object.__setattr__(result, "_edges", edges)
        return result

    def save(self, prefix: str | os.PathLike[str], **options: Any) -> str:
        """Saves as ``prefix-N`` and returns that path; N is one more than any number used there before."""
        return save_numbered(self, prefix, **options)

    def write(self, path: str | os.PathLike[str], **options: Any) -> str:
        """Saves at exactly this path, without a number, and returns it."""
        return save(path, self, **options).path

    def restore(self, path: Any, **options: Any) -> Restored:
        """`jaxckpt.restore` with this checkpoint as the target; nothing changes in place."""
        return restore(path, self, **options)

    read = restore


def _rebuild(root: Any, edges: dict[str, Any]) -> Checkpoint:
    return Checkpoint(root, **edges)


def _from_structure(structure: Structure, children: Sequence[Any]) -> Checkpoint:
    """The Checkpoint that a saved structure describes."""
    edges = {name.text: child for name, child in zip(structure.names, children, strict=True)}
    root = edges.pop("_root", None)
    result = Checkpoint(root)
    object.__setattr__(result, "_edges", edges)
    return result


known_classes[CHECKPOINT] = _from_structure

_RESERVED = frozenset(name for name in dir(Checkpoint) if not name.startswith("__")) | {"_edges", "_root"}
