"""Saving: flatten -> snapshot -> layout -> write (in the background) -> manifest -> commit."""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from msgspec import Struct, structs

from jaxckpt.errors import SlotsLeftOutWarning
from jaxckpt.graph.flatten import Flat, flatten
from jaxckpt.graph.model import ArraySpec, ObjectGraph, ValueSpec
from jaxckpt.progress import Progress, shown
from jaxckpt.report import SaveReport
from jaxckpt.storage import directory, hold, kv, state
from jaxckpt.storage.format.dtypes import numpy_dtype
from jaxckpt.storage.format.json_values import freeze_json
from jaxckpt.storage.format.spelling import places
from jaxckpt.storage.layout import Entry, layout, orbax_values, value_bytes
from jaxckpt.storage.stage import Contents, Facts, write_stage
from jaxckpt.writer import SaveFuture, writer

#: Host bytes that a save may hold in copies, when nothing else is asked for.
DEFAULT_MEMORY_LIMIT = 2 << 30


class Order(Struct, frozen=True, kw_only=True):
    """What a save is asked to be.

    Attributes:
        path: where.
        overwrite: whether an existing checkpoint is replaced.
        metadata: any JSON value.
        memory_limit: host bytes for copies.
        progress: see `save`.
        snapshot: "host", or "copy" to copy also host arrays that may alias the caller's memory.
        step, save_counter, writer, metrics: recorded in the manifest.
        sequence: called just before the manifest is written; gives its place in the order of commits.
        before_commit: called just before the commit; what it raises makes the save fail.
        after_commit: called when the checkpoint is durable, before the future is resolved.
    """

    path: str
    overwrite: bool = False
    metadata: Any = None
    memory_limit: int | None = None
    progress: Progress = None
    snapshot: str = "host"
    step: int | None = None
    save_counter: int | None = None
    writer: str = "hand"
    metrics: Mapping[str, float] | None = None
    sequence: Callable[[], int] | None = None
    before_commit: Callable[[], None] | None = None
    after_commit: Callable[[SaveReport], None] | None = None


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    overwrite: bool = False,
    metadata: Any = None,
    memory_limit: int | None = None,
    progress: Progress = None,
) -> SaveReport:
    """Saves a pytree; it is durable when this returns.

    Args:
        path: the checkpoint's directory, which must not exist yet.
        tree: any pytree. Its leaves: arrays of any dtype (jax, numpy, typed PRNG keys, `jax.Ref`), Python
            numbers, strings and bytes, and iterators that can tell their state.
        overwrite: replace what is at ``path``, atomically.
        metadata: any JSON value (a configuration, a commit), kept beside the tree and never matched.
        memory_limit: bytes of host memory that copies of the leaves may take.
        progress: called with (bytes done, bytes in all), or True for a bar.

    Raises:
        CheckpointExistsError: ``path`` exists.
        UnsupportedLeafError: a leaf cannot be saved; nothing was written.
        SaveError: the file system refused; nothing is left behind.
    """
    return save_async(
        path, tree, overwrite=overwrite, metadata=metadata, memory_limit=memory_limit, progress=progress
    ).result()


def save_async(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    snapshot: str = "host",
    overwrite: bool = False,
    metadata: Any = None,
    memory_limit: int | None = None,
    progress: Progress = None,
) -> SaveFuture:
    """Like `save`, but returns as soon as changes to the tree can no longer reach the checkpoint.

    After the call every leaf may be donated, deleted or overwritten. At most one save writes and one
    waits; a further call blocks until there is room.

    Args:
        path: as of `save`.
        tree: as of `save`.
        snapshot: "host" holds what JAX owns and copies what the caller can write to; "copy" also copies
            `jax.Array`s that may alias the caller's numpy memory (made by `device_put` or `from_dlpack`).
        overwrite: as of `save`.
        metadata: as of `save`.
        memory_limit: as of `save`.
        progress: as of `save`.
    """
    if snapshot not in ("host", "copy"):
        raise ValueError(f"snapshot must be 'host' or 'copy', not {snapshot!r}")
    order = Order(
        path=os.path.abspath(os.fspath(path)),
        overwrite=overwrite,
        metadata=metadata,
        memory_limit=memory_limit,
        progress=progress,
        snapshot=snapshot,
    )
    return submit(tree, order)


def submit(tree: Any, order: Order) -> SaveFuture:
    """Takes the snapshot of a tree and starts its save; see `save_async`."""
    kv.refuse_fork()
    started = time.time()
    clock = Stopwatch()
    freeze_json(order.metadata)  # refuses here what the manifest could not hold
    order = structs.replace(order, metadata=copy.deepcopy(order.metadata))
    state.refuse_tensorflow(os.path.dirname(order.path))
    directory.check(order.path, overwrite=order.overwrite)
    flat = flatten(tree)
    clock.lap("flatten")
    warn_left_out(flat.graph)
    limit = order.memory_limit or DEFAULT_MEMORY_LIMIT

    def snapshot() -> tuple[Callable[[], SaveReport], int]:
        clock.lap("wait")
        contents, held = take_snapshot(flat, copy=order.snapshot == "copy")
        clock.lap("snapshot")
        blocked = clock.total
        return lambda: _write(contents, order, clock, started, blocked), held

    return writer.submit(order.path, _expected_copies(flat), limit, snapshot)


class Stopwatch:
    """Seconds of each stage, in order."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.stages[stage] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def warn_left_out(graph: ObjectGraph) -> None:
    """Says once how many slots have no variable in the tree, and what to do."""
    if not graph.left_out:
        return
    optimizers = sorted(
        {leaf.state.optimizer for leaf in graph.leaves if leaf.state and leaf.kind == "skipped"}
    )
    warnings.warn(
        f"{graph.left_out} slots of {', '.join(optimizers)} are left out, because the parameters that they "
        "belong to are not in the tree: save both in one checkpoint, or jaxckpt.Values(state) to save every "
        "leaf as a plain variable",
        SlotsLeftOutWarning,
        stacklevel=5,
    )


def take_snapshot(flat: Flat, *, copy: bool) -> tuple[Contents, int]:
    """Holds every value so that nothing can change it; returns what to write and the bytes copied."""
    visible = places(flat.graph)
    entries = layout(flat.graph, visible)
    held = hold.hold_all([_value_of(flat, entry) for entry in entries], copy=copy)
    contents = Contents(
        graph=flat.graph,
        entries=entries,
        hosts=held.arrays,
        places=visible,
        orbax=orbax_values(flat.graph, visible),
    )
    return contents, held.nbytes


def _value_of(flat: Flat, entry: Entry) -> Any:
    for index in entry.owner[:-1]:
        flat = flat.states[index]
    leaf = flat.graph.leaves[entry.owner[-1]]
    if isinstance(leaf.spec, ValueSpec):
        return memory_of(value_bytes(leaf.spec))
    return flat.values[entry.owner[-1]]


def memory_of(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes as an array."""
    return np.frombuffer(data, np.uint8)


def _expected_copies(flat: Flat) -> int:
    """Bytes that the snapshot will copy, as far as the specs tell."""
    specs = [leaf.spec for leaf in flat.graph.leaves]
    arrays = [
        spec for spec in specs if isinstance(spec, ArraySpec) and (spec.array_type != "jax" or spec.ref)
    ]
    own = sum(math.prod(spec.stored_shape) * numpy_dtype(spec.dtype).itemsize for spec in arrays)
    return own + sum(map(_expected_copies, flat.states.values()))


def _write(contents: Contents, order: Order, clock: Stopwatch, started: float, blocked: float) -> SaveReport:
    """What runs in the background: everything from the snapshot to the commit."""
    clock.lap("queue")
    facts = Facts(
        metadata=order.metadata,
        started=started,
        step=order.step,
        save_counter=order.save_counter,
        writer=order.writer,
        metrics=order.metrics,
        sequence=order.sequence or (lambda: state.next_sequence(os.path.dirname(order.path))),
    )
    with shown(order.progress, "Saving") as report:
        report(0, contents.nbytes)
        staging = directory.stage(order.path)
        try:
            limit = order.memory_limit or DEFAULT_MEMORY_LIMIT
            nbytes = write_stage(staging, contents, facts, memory_limit=limit, lap=clock.lap)
            if order.before_commit is not None:
                order.before_commit()
            directory.commit(staging, overwrite=order.overwrite)  # <- the commit
        except BaseException:
            directory.abandon(staging)
            raise
        clock.lap("commit")
        report(contents.nbytes, contents.nbytes)
    leaves = contents.graph.leaves
    done = SaveReport(
        path=order.path,
        step=order.step,
        nbytes=nbytes,
        leaves=sum(leaf.kind in ("array", "value", "iterator") for leaf in leaves),
        slots=len(contents.graph.slots),
        slots_left_out=contents.graph.left_out,
        not_saved=tuple(leaf.key for leaf in leaves if leaf.kind == "callable"),
        hidden_from_orbax=_hidden(contents),
        seconds_blocked=blocked,
        seconds=clock.total,
        stages=clock.stages,
    )
    if order.after_commit is not None:
        order.after_commit(done)
    return done


def _hidden(contents: Contents) -> tuple[str, ...]:
    """Keys of the values that plain Orbax does not see."""
    seen = {place.leaf for place in contents.places}
    leaves = enumerate(contents.graph.leaves)
    return tuple(
        leaf.key
        for index, leaf in leaves
        if index not in seen and leaf.kind in ("array", "value", "iterator")
    )
