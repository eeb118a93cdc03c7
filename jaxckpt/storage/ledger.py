"""One manager's directory: what is in it, who writes to it, what goes. Acts on what pure functions decide."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxckpt.errors import (
    CheckpointNotFoundError,
    CheckpointWarning,
    CorruptCheckpointError,
    DirectoryInUseError,
)
from jaxckpt.storage import directory as directories
from jaxckpt.storage import pins, state
from jaxckpt.storage.heartbeat import Watch
from jaxckpt.storage.lease import Lease
from jaxckpt.storage.retention import CheckpointInfo, Policy, removable
from jaxckpt.storage.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from jaxckpt.storage.state import Row


class Ledger:
    """A directory as a manager sees it and acts on it. Safe to share among threads.

    Args:
        directory: as paths in answers begin.
        name: of checkpoints, before their number.
        policy: what is kept.
        drain: returns when no save of the manager is under way.

    Attributes:
        root: the directory's absolute path: a later chdir must not move a run.
        lease: of the directory.
    """

    def __init__(self, directory: str, *, name: str, policy: Policy, drain: Callable[[], None]) -> None:
        self.directory = directory
        self.root = os.path.abspath(directory)
        self.lease = Lease(self.root, drain=drain)
        self._prefix = os.path.join(directory, "")
        self._name = name
        self._policy = policy
        self._watch = Watch()
        self._pid = os.getpid()
        self._acting = threading.Lock()  # the state file and deletions; taken before the other
        self._looking = threading.Lock()
        self._known: State | None = None
        self._lines: state.Lines = {}

    @property
    def is_child(self) -> bool:
        """Whether this is a process that was forked with the ledger in its memory."""
        return os.getpid() != self._pid

    def view(self, *, quick: bool = False) -> State:
        """What the directory holds now; ``quick`` as of `state.scan`."""
        if self.is_child:  # a thread of the parent may have held the lock
            return state.view(self.root)
        with self._looking:
            known = state.load(self.root) if self._known is None else self._known
            self._known = state.scan(self.root, known, quick=quick and self._known is not None)
            return self._known

    def candidates(self) -> list[Row]:
        """What can be the newest, oldest commit first: the numbered ones of this name.

        Only where there is none of them (a run that was renamed) all others: finding nothing would mean
        starting anew in silence.
        """
        rows = self.view().rows
        return [row for row in rows if self.step(row.name) is not None] or list(rows)

    def path(self, row: Row) -> str:
        return self._prefix + row.name

    def step(self, name: str) -> int | None:
        """The step that a name says, or None."""
        return state.number_of(name, self._name)

    def name_of(self, step: int) -> str:
        return f"{self._name}-{step}"

    def find(self, step: int) -> Row:
        """The checkpoint of a step.

        Raises:
            CheckpointNotFoundError: there is none; the message lists the steps that exist.
        """
        rows = self.view().rows
        for row in rows:
            if row.name == self.name_of(step):
                return row
        steps = sorted(number for row in rows if (number := self.step(row.name)) is not None)
        there = f"the steps there are {', '.join(map(str, steps))}" if steps else "it has no steps"
        raise CheckpointNotFoundError(f"{self.directory} has no checkpoint of step {step}; {there}")

    def owns(self, row: Row) -> bool:
        """Whether a manager of this name wrote it: not by hand, and no copy of one under another name."""
        return row.writer == "manager" and row.name == f"{self._name}-{row.step}"

    def infos(self, rows: Iterable[Row] | None = None) -> list[CheckpointInfo]:
        """What is told of each checkpoint, oldest commit first."""
        pinned = pins.pinned(self.root)
        return [self._info(row, row.name in pinned) for row in (self.view().rows if rows is None else rows)]

    def info(self, step: int) -> CheckpointInfo:
        """What is told of the checkpoint of a step.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: its manifest is damaged.
            UnsupportedFormatError: it is a later release's.
        """
        row = self.find(step)
        if row.unsupported:
            row = state.read_row(os.path.join(self.root, row.name))  # raises
        if row.damage:
            raise CorruptCheckpointError(row.damage, files=(state.MANIFEST,))
        return self._info(row, row.name in pins.pinned(self.root))

    def claim(self) -> bool:
        """Takes the directory's lease, and sweeps what dead writers have left.

        Returns:
            Whether it was not held before.

        Raises:
            DirectoryInUseError: another live process holds it.
            UnsupportedFormatError: the directory is TensorFlow's, or a later release's.
            SaveError: the file system refuses.
        """
        if self.lease.held:
            return False
        state.check_ours(self.root)
        with directories.saving(self.root):
            self.lease.acquire()
            with self._looking:  # others may have been here since; but what was once seen is not forgotten
                fresh, seen = state.view(self.root), self._known or State()
                self._known = replace(
                    fresh,
                    highest=max(fresh.highest, seen.highest),
                    sequence=max(fresh.sequence, seen.sequence),
                )
            directories.sweep(self.root)
        return True

    def next_number(self, pending: Iterable[int]) -> int:
        """One more than the highest number ever used, saves under way included."""
        known = self._known or self.view()
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            names = []
        return state.next_number(known, names, self._name, pending)

    def next_sequence(self) -> int:
        """The place of a checkpoint that is committed now."""
        return self.view(quick=True).sequence + 1

    def committed(self) -> None:
        """To be called when a new checkpoint is durable: lets the old ones go, and writes the state file."""
        with self._acting:
            try:
                if self._policy.max_to_keep is not None:
                    self._prune()
            finally:
                self._store()

    def remove(self, row: Row) -> None:
        """Deletes a checkpoint.

        Raises:
            DirectoryInUseError: a reader holds it.
        """
        with self._acting:
            if not pins.remove(self.root, row.name, is_kept=lambda: self._is_kept(row.name)):
                raise DirectoryInUseError(
                    f"{self.path(row)} is held by a reader, or was pinned just now, and was not deleted"
                )
            self._store()

    def _info(self, row: Row, pinned: bool) -> CheckpointInfo:
        return CheckpointInfo(
            path=self.path(row),
            step=self.step(row.name),
            sequence=row.sequence or 0,
            time=row.time,
            metrics=MappingProxyType(row.metrics),
            metadata=row.metadata,
            nbytes=row.nbytes,
            nbytes_shared=row.nbytes_shared,
            pinned=pinned,
        )

    def _store(self) -> None:
        try:
            state.store(self.root, self.view(quick=True), self._lines)
        except OSError as error:
            # A full disk, mostly. It is a cache, and the deletions to come make room.
            warnings.warn(f"the state file was not written: {error}", CheckpointWarning, stacklevel=2)

    def _prune(self) -> None:
        """Deletes what goes."""
        rows = {self.path(row): row for row in self.view(quick=True).rows}
        owned = {path for path, row in rows.items() if self.owns(row)}
        held = {self._prefix + name for name in pins.held(self.root, self._watch)}
        for info in removable(self.infos(rows.values()), self._policy, owned=owned, held=held):
            row = rows[info.path]
            try:
                now = state.look(self.root, row.name, row)
                if now is not None and (now is row or self.owns(now)):  # else somebody has put another there
                    pins.remove(self.root, row.name, is_kept=lambda name=row.name: self._is_kept(name))
            except FileNotFoundError:
                pass  # somebody else removed it
            except OSError as error:
                warnings.warn(f"{info.path} could not be deleted: {error}", CheckpointWarning, stacklevel=2)

    def _is_kept(self, name: str) -> bool:
        return name in pins.pinned(self.root) or name in pins.held(self.root, self._watch)


def later(rows: Sequence[Row], row: Row) -> list[Row]:
    """Those that were committed after ``row``; rows are in the order of commits."""
    names = [other.name for other in rows]
    return list(rows[names.index(row.name) + 1 :]) if row.name in names else []
