"""Reading a checkpoint without a program: no device, no jax, values one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jaxckpt import listing
from jaxckpt.errors import CheckpointNotFoundError, UnsupportedFormatError
from jaxckpt.graph.model import ArraySpec, IteratorSpec, Leaf, ObjectGraph, ValueSpec
from jaxckpt.storage.opened import Make, OpenCheckpoint
from jaxckpt.storage.values import Done

if TYPE_CHECKING:
    from jaxckpt.graph.status import RestoreStatus

#: What TensorFlow's readers put behind the key of a variable.
TENSORFLOW_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"

PathLike = str | os.PathLike[str]


class CheckpointReader(Mapping[str, Any]):
    """One opened checkpoint: a mapping from keys to values.

    Opening reads the graph and no array. Every value is checked against its digest when it is read. What
    is open stays readable when the directory is pruned meanwhile.

    Attributes:
        path: the checkpoint's directory.
        graph: its named graph.
        metadata: the JSON value given at the save, or None.
    """

    def __init__(self, path: PathLike) -> None:
        self._open = OpenCheckpoint(os.fspath(path))
        self.path = self._open.path
        self.graph: ObjectGraph = self._open.graph
        self.metadata: Any = self._open.manifest.metadata

    def __getitem__(self, key: str) -> Any:
        """The value: a numpy array for arrays (the bits of a PRNG key), else the Python value."""
        return self._open.read([self._index(key)])[0]

    def __iter__(self) -> Iterator[str]:
        return (leaf.key for leaf in self.graph.leaves if has_value(leaf))

    def __len__(self) -> int:
        return sum(map(has_value, self.graph.leaves))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    # A Mapping would compare, hence read, all values.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"<CheckpointReader {self.path}: {len(self)} values>"

    def read(
        self,
        leaves: Sequence[int],
        make: Make | None = None,
        *,
        into: Sequence[Any] | None = None,
        done: Done = int,
    ) -> list[Any]:
        """The values of several leaves (indices into ``graph.leaves``), in fewer reads than one by one.

        Args:
            leaves: which.
            make: makes of an array and its spec what it was; for arrays inside iterators' states.
            into: for each leaf a writable buffer of its array's size to read into (then the result has None
                for it), or None.
            done: called with the bytes of each part that has been read, by one thread at a time.
        """
        return self._open.read(leaves, make, into=into, done=done)

    @property
    def save_counter(self) -> int | None:
        """The number that a numbered save, `Checkpoint.save` or a manager's, recorded; else None."""
        return self._open.manifest.files.save_counter

    def nbytes(self, leaf: int) -> int:
        """Bytes that reading a leaf takes; Python values, which the graph holds, take none."""
        return self._open.nbytes(leaf)

    def digest(self, leaf: int) -> Any:
        """Something hashable that is equal for two leaves whose stored values are equal."""
        return self._open.digest(leaf)

    def has_tensor(self, key: str) -> bool:
        """Whether there is an array or a number under this key."""
        index = self._find(key)
        return index is not None and _is_tensor(self.graph.leaves[index])

    def get_tensor(self, key: str) -> npt.NDArray[Any]:
        """The value as a numpy array, whatever its type was.

        Raises:
            KeyError: no value has this key.
        """
        return np.asarray(self[key])

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        """The shape of each array and number, in sorted order of keys."""
        return {key: list(shape) for key, (shape, _) in self._tensors().items()}

    def get_variable_to_dtype_map(self) -> dict[str, np.dtype[Any]]:
        """The dtype of each array and number, in sorted order of keys."""
        return {key: dtype for key, (_, dtype) in self._tensors().items()}

    def debug_string(self) -> str:
        """A line for each array and number: key, dtype, shape."""
        return "\n".join(f"{key} ({dtype}) {list(shape)}" for key, (shape, dtype) in self._tensors().items())

    def match(self, target: Any, **rules: Any) -> RestoreStatus:
        """What `restore` would do with this target and these rules, without reading an array.

        What the checkpoint lacks is in the status's ``missing``, and what is undecided in ``ambiguous``,
        as if ``partial=True`` were given.

        Raises:
            RestoreError: a leaf of the target has another kind, shape or dtype.
        """
        from jaxckpt.restoring import match_target  # needs jax, which a reader otherwise does without

        return match_target(self, target, **rules)

    def target(self, sharding: Any = None) -> Any:
        """The saved structure with a `jax.ShapeDtypeStruct` for each array: a target without a program.

        Args:
            sharding: None, one `jax.sharding.Sharding` for all, or a function of (key, ShapeDtypeStruct).
        """
        from jaxckpt.saved import saved_target

        return saved_target(self, sharding)

    def close(self) -> None:
        """Lets go of the open files; nothing can be read any more."""
        self._open.close()

    def _find(self, key: str) -> int | None:
        index = self.graph.by_key.get(key.removesuffix(TENSORFLOW_SUFFIX))
        return index if index is not None and has_value(self.graph.leaves[index]) else None

    def _index(self, key: str) -> int:
        index = self._find(key)
        if index is None:
            raise KeyError(f"{key!r} is not in {self.path}.{listing.did_you_mean(key, self)}")
        return index

    def _tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        found = {leaf.key: _tensor(leaf) for leaf in self.graph.leaves if _is_tensor(leaf)}
        return dict(sorted(found.items()))


def has_value(leaf: Leaf) -> bool:
    """Whether the checkpoint holds a value for this leaf: not for a function or a slot left out."""
    return isinstance(leaf.spec, ArraySpec | ValueSpec | IteratorSpec)


def _is_tensor(leaf: Leaf) -> bool:
    spec = leaf.spec
    return isinstance(spec, ArraySpec) or (isinstance(spec, ValueSpec) and spec.type not in ("str", "bytes"))


def _tensor(leaf: Leaf) -> tuple[tuple[int, ...], np.dtype[Any]]:
    from jaxckpt.storage.format.dtypes import numpy_dtype

    if isinstance(leaf.spec, ArraySpec):
        return leaf.spec.stored_shape, numpy_dtype(leaf.spec.dtype)
    assert isinstance(leaf.spec, ValueSpec)
    return (), np.asarray(leaf.spec.value).dtype


def open_exact(path: PathLike) -> CheckpointReader:
    """Opens the checkpoint at exactly this path.

    Raises:
        CheckpointNotFoundError: there is none; the message names what there is.
    """
    path = os.path.abspath(os.fspath(path))
    try:
        empty = not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))
    except FileNotFoundError:  # deleted between the two
        empty = True
    if empty:
        raise CheckpointNotFoundError(listing.not_found(path))
    try:
        return CheckpointReader(path)
    except UnsupportedFormatError as error:
        newest = listing.latest_checkpoint(path) if os.path.isdir(path) else None
        if newest is None:
            raise
        raise UnsupportedFormatError(
            f"{path} is a directory of checkpoints: give one of them, such as the newest, {newest}"
        ) from error


def load_checkpoint(path_or_directory: PathLike) -> CheckpointReader:
    """Opens a checkpoint, or the newest one of a directory of them.

    Raises:
        CheckpointNotFoundError: neither is there; the message names what is.
        CorruptCheckpointError: it is not what was written.
        UnsupportedFormatError: it is no checkpoint that this release reads.
    """
    path = os.path.abspath(os.fspath(path_or_directory))
    if listing.is_checkpoint(path):
        return CheckpointReader(path)
    found = listing.open_newest(path, CheckpointReader) if os.path.isdir(path) else None
    if found is None:
        raise CheckpointNotFoundError(listing.not_found(path))
    return found


def list_variables(path: PathLike) -> list[tuple[str, list[int]]]:
    """Keys and shapes of all arrays and numbers of a checkpoint, sorted by key."""
    return list(load_checkpoint(path).get_variable_to_shape_map().items())
