"""What a manager's directory holds: listing and pinning, which anybody may beside a live trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxckpt import listing
from jaxckpt.cadence import as_step
from jaxckpt.saves import Saves
from jaxckpt.storage import pins, retention, state
from jaxckpt.storage.ledger import Ledger

if TYPE_CHECKING:
    from jaxckpt.storage.retention import CheckpointInfo, Policy


class Catalog:
    """The checkpoints of a directory.

    Args:
        directory: where they are; it may be missing.
        name: of checkpoints, before their number.
        policy: what is kept, and what is best.

    Attributes:
        directory: as given.
    """

    def __init__(self, directory: str, *, name: str, policy: Policy) -> None:
        self.directory = directory
        self._policy = policy
        self._saves = Saves()
        self._ledger = Ledger(directory, name=name, policy=policy, drain=self._settle)

    @property
    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint: the one that was committed last."""
        row = listing.newest(self._ledger.candidates(), self.directory)
        return None if row is None else self._ledger.path(row)

    @property
    def checkpoints(self) -> list[str]:
        """Paths of all checkpoints in the directory, oldest commit first."""
        return [self._ledger.path(row) for row in self._ledger.view().rows]

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest commit first, so that the last one is the newest."""
        return [step for row in self._ledger.view().rows if (step := self._ledger.step(row.name)) is not None]

    @property
    def best(self) -> str | None:
        """Path of the best checkpoint by ``metric``, or None when none has a finite one.

        Raises:
            ValueError: the manager was made without a metric.
        """
        found = retention.best(self._ledger.infos(), self._policy)
        return None if found is None else found.path

    def info(self, step: int) -> CheckpointInfo:
        """What is known of a checkpoint without its tree.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: its manifest is damaged.
        """
        self._settle()
        return self._ledger.info(as_step(step))

    def pin(self, step: int) -> None:
        """Keeps a checkpoint until it is unpinned; works beside a live trainer, from any process.

        Raises:
            CheckpointNotFoundError: there is no such step (any more).
            UnsupportedFormatError: the directory is TensorFlow's.
        """
        self._settle()
        state.check_ours(self._ledger.root)
        pins.pin(self._ledger.root, self._ledger.find(as_step(step)).name)

    def unpin(self, step: int) -> None:
        """Lets retention decide again; from any process.

        Raises:
            CheckpointNotFoundError: there is neither such a step nor a pin of it.
        """
        self._settle()
        name = self._ledger.name_of(as_step(step))
        if name not in pins.pinned(self._ledger.root):
            self._ledger.find(as_step(step))
        pins.unpin(self._ledger.root, name)

    def _settle(self) -> None:
        """Returns when no save of this manager is under way; a child has none."""
        if not self._ledger.is_child:
            self._saves.settle()
