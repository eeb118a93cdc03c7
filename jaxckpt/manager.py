"""`CheckpointManager`: the checkpoints of one run in one directory: when, under which number, how many."""

from __future__ import annotations

import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

from jaxckpt import initialize, listing
from jaxckpt.cadence import LastSave, SaveEvery, as_step, check_rule, is_due, refuse_integer
from jaxckpt.catalog import Catalog
from jaxckpt.errors import CheckpointExistsError, DirectoryInUseError, NewerCheckpointsWarning
from jaxckpt.preemption import notice
from jaxckpt.restoring import Restored, restore
from jaxckpt.saving import Order, submit
from jaxckpt.storage import pins, retention
from jaxckpt.storage.ledger import later
from jaxckpt.storage.retention import Keep, Metrics, Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import timedelta
    from types import TracebackType

    from jaxckpt.report import SaveReport
    from jaxckpt.storage.state import Row
    from jaxckpt.writer import SaveFuture


class CheckpointManager(Catalog):
    """Saves, numbers, keeps and restores the checkpoints of a run.

    Making one writes nothing. The directory is written to from the first `save` on, by one process at a
    time; reading, `pin` and `unpin` work beside it from any process. It is safe to share among threads.

    Args:
        directory: where the checkpoints are; made at the first save.
        max_to_keep: how many of the last ones are kept; None for all.
        keep_best: keep so many of the best ones by ``metric`` as well.
        metric: name of a metric, or a function of the metrics of one save.
        mode: whether a low ("min") or a high ("max") metric is good.
        keep_every: keep the multiples of this many steps, or one for each timedelta, as well.
        keep: a function of a list of `CheckpointInfo` (those of managers, oldest commit first) that returns
            what else is to be kept.
        save_every: a number of steps (saves at the first call, and whenever a multiple was passed since the
            last save), a timedelta, or a function of the step. Without ``step=`` calls are counted.
        on_busy: "wait" when an earlier save of this manager is still writing, or "skip".
        checkpoint_name: checkpoints are called ``<checkpoint_name>-<step>``.
        memory_limit: bytes of host memory that copies of leaves may take in a save, and in a restore what is
            read and not yet placed.

    Attributes:
        directory: as given.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        keep_best: int = 0,
        metric: str | Callable[[Metrics], float] | None = None,
        mode: Mode | None = None,
        keep_every: int | timedelta | None = None,
        keep: Keep | None = None,
        save_every: SaveEvery | None = None,
        on_busy: Literal["wait", "skip"] = "wait",
        checkpoint_name: str = "ckpt",
        memory_limit: int | None = None,
    ) -> None:
        policy = Policy(
            max_to_keep=max_to_keep,
            keep_best=keep_best,
            metric=metric,
            mode=mode,
            keep_every=keep_every,
            keep=keep,
        )
        if on_busy not in ("wait", "skip"):
            raise ValueError(f"on_busy must be 'wait' or 'skip', not {on_busy!r}")
        if (
            not checkpoint_name
            or checkpoint_name.startswith(".")
            or os.path.basename(checkpoint_name) != checkpoint_name
        ):
            raise ValueError(f"checkpoint_name must be a plain file name, not {checkpoint_name!r}")
        super().__init__(os.fspath(directory), name=checkpoint_name, policy=policy)
        self._save_every = check_rule(save_every)
        self._on_busy = on_busy
        self._memory_limit = memory_limit
        self._closed = False
        self._turn = threading.Lock()  # one call of save at a time; never taken by the writer's thread
        self._calls = 0
        self._told: set[str] = set()

    def save(
        self,
        tree: Any,
        *,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Any = None,
        overwrite: bool = False,
        force: bool = False,
    ) -> SaveFuture | None:
        """Saves in the background; returns as soon as the next step may overwrite the values.

        Args:
            tree: any pytree.
            step: its number; None for one more than the highest ever used in the directory.
            metrics: scalars (Python, numpy or jax) to choose the best by.
            metadata: any JSON value, kept beside the tree and never matched.
            overwrite: replace a checkpoint of that step, atomically.
            force: save whatever ``save_every`` and ``on_busy`` say, as once `preempted` has answered true.

        Returns:
            The outcome to come, or None when this call was skipped.

        Raises:
            CheckpointExistsError: there is a checkpoint of that step.
            DirectoryInUseError: another live process, or a newer manager of this one, writes there.
            UnsupportedFormatError: the directory is TensorFlow's.
            TypeError: a metric is no number; the tree is a bare integer.
            CheckpointError: an earlier save failed in the background and nobody has looked at its outcome;
                nothing is saved by this call. (Once `preempted` has answered true it is raised later, by
                `wait` or `close`.)
        """
        self._check_usable()
        refuse_integer("save", "tree", tree)
        number = None if step is None else as_step(step)
        with self._turn:
            if not notice.told:
                self._saves.raise_failed()
            self._calls += 1
            if not force and not self._is_wanted(number):
                return None
            if notice.told and not overwrite and (done := self._saves.outcome(number)):
                return done
            return self._submit(tree, number, retention.as_scalars(metrics), metadata, overwrite)

    def should_save(self, step: int) -> bool:
        """Whether `save` would save this step, by ``save_every``."""
        return notice.told or self._is_due(as_step(step))

    def preempted(self, step: int) -> bool:
        """Whether this process is about to be taken away; asked once a step, it stays true.

        ``if manager.preempted(step): manager.save(state, step=step); break``. From then on each save is made,
        whatever ``save_every`` and ``on_busy`` say; where the step was saved just before, or is the one that
        was restored, `save` returns that outcome.

        The notice is SIGTERM, heard from the first call on: before it, and after `close`, the signal does
        what it always did. The handler saves nothing, and calls the one that was there before. Where JAX's
        preemption service is on (`jax.distributed.initialize`) it is JAX that listens, which takes it a
        second or so, and in several processes the answer is true from the same step on in all.

        Args:
            step: the step at hand.

        Raises:
            RuntimeError: the notice would not be heard: the first call came from another thread than the
                main one; JAX's service is off in several processes, or its handler was replaced.
        """
        number = as_step(step)
        if self._closed:
            return notice.told
        self._check_usable()
        self._saves.moved_to(number)
        return notice.ask(self, number)

    def restore(self, target: Any = None, *, step: int | None = None, **options: Any) -> Restored:
        """Restores the newest checkpoint that is whole, or the one of a step. Saves under way are awaited.

        Args:
            target: as of `jaxckpt.restore`.
            step: which one; None for the newest. A damaged newer one is then passed over with one
                `CorruptCheckpointWarning`, and an empty directory gives the target back.
            **options: of `jaxckpt.restore`.

        Raises:
            CheckpointNotFoundError: there is no such step; the message lists those that exist.
            CorruptCheckpointError: the step is damaged; without a step: all checkpoints are.
            RestoreError: target and checkpoint differ.
        """
        refuse_integer("restore", "target", target)
        self._settle()
        if self._memory_limit is not None:
            options.setdefault("memory_limit", self._memory_limit)

        def attempt(path: str) -> Restored:
            restored = restore(path, target=target, **options)
            self._saves.came_from(self._ledger.step(os.path.basename(path)), path)
            return restored

        if step is None:
            found = listing.take_newest(self._ledger.candidates, self._ledger.root, attempt)
            return restore(None, target=target, **options) if found is None else found
        row = self._ledger.find(as_step(step))
        restored = attempt(os.path.join(self._ledger.root, row.name))
        self._tell_of_later(row)
        return restored

    def restore_or_initialize(self, init_fn: Callable[[], Any], **options: Any) -> Restored:
        """Restores the newest checkpoint into what ``init_fn`` would make; with none, makes that.

        Args:
            init_fn: returns the whole tree. It is traced: arrays that come from the checkpoint are neither
                computed nor allocated.
            **options: of `restore`; with ``partial=True`` what the checkpoint lacks is initialized.
        """
        initializer = initialize.trace(init_fn)
        return self.restore(initializer.target, **options).initialize(initializer)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint that a manager wrote, were it the latest. Saves under way are awaited.

        Raises:
            CheckpointNotFoundError: there is no such step.
            DirectoryInUseError: another live process writes to the directory, or holds this checkpoint.
            ValueError: it is pinned, or was written by hand.
        """
        self._check_usable()
        with self._turn:
            self._settle()
            ledger = self._ledger
            row = ledger.find(as_step(step))
            if not ledger.owns(row):
                raise ValueError(f"{ledger.path(row)} was not written by a manager: remove it by hand")
            if row.name in pins.pinned(ledger.root):
                raise ValueError(f"{ledger.path(row)} is pinned: unpin({step}) first")
            new = ledger.claim()
            try:
                ledger.remove(row)
            finally:
                if new:  # only saving makes this manager the writer
                    ledger.lease.release()

    def wait(self) -> None:
        """Returns when every save is durable; raises what made one fail and was not looked at, once."""
        self._settle()
        self._saves.raise_failed()

    def close(self) -> None:
        """Waits like `wait`, and gives the directory to other processes. What is closed can still be read."""
        if self._closed or self._ledger.is_child:
            return
        try:
            self._settle()
        finally:
            if not self._saves.under_way():  # after an interrupted wait these still need the lease
                self._closed = True
                self._ledger.lease.release()
                notice.leave(self)
        self._saves.raise_failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            self._saves.unsee()  # whoever handles the other error may not see this: the exit code tells
            error.add_note(f"While this was raised, a checkpoint could not be saved: {failure}")

    def __repr__(self) -> str:
        return f"<CheckpointManager {self.directory}: {len(self.steps)} steps>"

    def _check_usable(self) -> None:
        if self._ledger.is_child:
            raise DirectoryInUseError(
                f"the writer of {self.directory} is the process that made this manager; this one was forked "
                "from it: save there, or make a manager for another directory here"
            )
        if self._closed:
            raise ValueError(f"the manager of {self.directory} is closed: make a new one")

    def _is_wanted(self, step: int | None) -> bool:
        if notice.told:
            return True
        return self._is_due(step) and not (self._on_busy == "skip" and self._saves.under_way())

    def _is_due(self, step: int | None) -> bool:
        if isinstance(self._save_every, int):
            step = self._calls if step is None else step
        elif step is None:
            step = self._ledger.next_number(self._saves.numbers()) if callable(self._save_every) else 0
        return is_due(self._save_every, step=step, last=self._saves.last, now=time.monotonic())

    def _submit(
        self, tree: Any, step: int | None, metrics: dict[str, float] | None, metadata: Any, overwrite: bool
    ) -> SaveFuture:
        ledger = self._ledger
        ledger.claim()
        numbers = self._saves.numbers()
        following = ledger.next_number(numbers)
        number = following if step is None else step
        path = os.path.join(ledger.root, ledger.name_of(number))
        if number in numbers and not overwrite:
            raise CheckpointExistsError(f"{path} is being written: choose another step, or overwrite=True")
        last = LastSave(step=self._calls if step is None else step, time=time.monotonic())
        order = Order(
            path=path,
            overwrite=overwrite,
            metadata=metadata,
            memory_limit=self._memory_limit,
            step=number,
            save_counter=max(number, following - 1),  # the highest number ever: the state may be lost
            writer="manager",
            metrics=metrics,
            sequence=ledger.next_sequence,
            before_commit=ledger.lease.check,
            after_commit=self._committed,
        )
        future = submit(tree, order)
        self._saves.add(future, number, last)
        return future

    def _committed(self, report: SaveReport) -> None:
        try:
            self._ledger.committed()
        except Exception as error:  # of keep= or metric=, mostly
            self._saves.failed_after(report.path, error)

    def _tell_of_later(self, row: Row) -> None:
        after = later(self._ledger.candidates(), row)
        if after and row.name not in self._told:
            self._told.add(row.name)
            warnings.warn(
                f"{self._ledger.path(row)} was restored, but there are later ones: "
                f"{', '.join(other.name for other in after)}. What is saved from here on is newer still",
                NewerCheckpointsWarning,
                stacklevel=3,
            )
