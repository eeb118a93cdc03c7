"""Saving: flatten -> snapshot -> (in the background) plan -> write -> manifest -> commit."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from msgspec import Struct, structs

from jaxckpt.errors import SlotsLeftOutWarning
from jaxckpt.graph.collector import paused
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.model import ObjectGraph
from jaxckpt.progress import Progress, shown, silent
from jaxckpt.report import SaveReport
from jaxckpt.snapshot import Borrowing, Snapshot, contents_of, sizes, take_snapshot
from jaxckpt.storage import directory, kv, state
from jaxckpt.storage.format.json_values import freeze_json
from jaxckpt.storage.memory import default_limit
from jaxckpt.storage.stage import Contents, Facts, write_stage
from jaxckpt.writer import SaveFuture, writer


class Order(Struct, frozen=True, kw_only=True):
    """What a save is asked to be.

    Attributes:
        path: where.
        overwrite: whether an existing checkpoint is replaced.
        metadata: any JSON value.
        memory_limit: host bytes for copies.
        progress: see `save`.
        snapshot: see `save_async`.
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
        memory_limit: bytes of host memory that this save may take beside the state; a quarter of the host's
            memory if it is not given. Where copies of what can change (numpy arrays, arrays of an
            accelerator) would not fit, nothing is copied, and the call returns when the values are written.
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
            `jax.Array`s that may alias the caller's numpy memory (made by `device_put` or `from_dlpack`);
            "device" copies the arrays of an accelerator there first, if it has room for all of them, so that
            the call does not wait for them to come to the host.
        overwrite: as of `save`.
        metadata: as of `save`.
        memory_limit: as of `save`.
        progress: as of `save`.
    """
    if snapshot not in ("host", "device", "copy"):
        raise ValueError(f"snapshot must be 'host', 'device' or 'copy', not {snapshot!r}")
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
    with paused():
        flat = flatten(tree)
    clock.lap("flatten")
    warn_left_out(flat.graph)
    limit = order.memory_limit or default_limit()
    nbytes, copies = sizes(flat)
    borrowing = Borrowing() if copies > limit else None

    def snapshot() -> tuple[Callable[[], SaveReport], int]:
        clock.lap("wait")
        with paused():
            taken = take_snapshot(flat, order.snapshot, borrow=borrowing is not None)
        clock.lap("snapshot")
        clock.block()
        # (no closure: the traceback of an error keeps those, with all that is in them)
        return partial(_write, taken, order, clock, started, borrowing), nbytes

    future = writer.submit(order.path, nbytes, limit, snapshot)
    if borrowing is not None:
        borrowing.wait()
    return future


class Stopwatch:
    """Seconds of each stage, in order."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.stages: dict[str, float] = {}
        self.blocked = 0.0

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.stages[stage] = now - self._last
        self._last = now

    def block(self) -> None:
        """Notes that the caller has waited until now."""
        self.blocked = self.total

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


def _write(
    snapshot: Snapshot, order: Order, clock: Stopwatch, started: float, borrowing: Borrowing | None
) -> SaveReport:
    """What runs in the background: everything from the snapshot to the commit."""
    clock.lap("queue")
    try:
        return _write_values(snapshot, order, clock, started, borrowing)
    finally:
        if borrowing is not None:
            borrowing.release()


def _write_values(
    snapshot: Snapshot, order: Order, clock: Stopwatch, started: float, borrowing: Borrowing | None
) -> SaveReport:
    contents = contents_of(snapshot)
    clock.lap("plan")

    def lap(stage: str) -> None:
        clock.lap(stage)
        if stage == "write" and borrowing is not None:
            borrowing.end()
            clock.block()

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
        total = contents.nbytes

        def progress(done: int) -> None:
            report(min(done, total), total)

        report(0, total)
        staging = directory.stage(order.path, total)
        try:
            limit = order.memory_limit or default_limit()
            watch = None if report is silent else progress
            nbytes = write_stage(staging, contents, facts, memory_limit=limit, lap=lap, progress=watch)
            if order.before_commit is not None:
                order.before_commit()
            directory.commit(staging, overwrite=order.overwrite, nbytes=nbytes)  # <- the commit
        except BaseException:
            directory.abandon(staging)
            raise
        clock.lap("commit")
        report(total, total)
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
        seconds_blocked=clock.blocked,
        seconds=clock.total,
        stages=clock.stages,
    )
    if order.after_commit is not None:
        order.after_commit(done)
    return done


def _hidden(contents: Contents) -> tuple[str, ...]:
    """Keys of the values that plain Orbax does not see."""
    seen = {place.leaf for place in contents.plan.places}
    leaves = enumerate(contents.graph.leaves)
    return tuple(
        leaf.key
        for index, leaf in leaves
        if index not in seen and leaf.kind in ("array", "value", "iterator")
    )
