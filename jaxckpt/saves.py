"""The saves of one manager: which are under way, which failed, which was the last."""

from __future__ import annotations

import contextlib
from concurrent import futures
from dataclasses import dataclass

from jaxckpt.cadence import LastSave
from jaxckpt.report import SaveReport
from jaxckpt.writer import SaveFuture, writer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    future: SaveFuture
    number: int
    last: LastSave


class Saves:
    """Keeps account of one manager's saves.

    Attributes:
        last: the last one that was accepted and has not failed, for `cadence.is_due`.
    """

    def __init__(self) -> None:
        self.last: LastSave | None = None
        self._pending: list[_Pending] = []
        self._failed, self._told_of = list[SaveFuture](), list[SaveFuture]()
        self._saved: tuple[int, SaveFuture] | None = None
        self._restored: tuple[int, SaveFuture] | None = None

    def add(self, future: SaveFuture, number: int, last: LastSave) -> None:
        """Takes account of a save that was accepted."""
        self.last = last
        self._saved, self._restored = (number, future), None
        self._pending.append(_Pending(future=future, number=number, last=last))

    def came_from(self, number: int | None, path: str) -> None:
        """Takes note that the run goes on from this checkpoint."""
        if number is not None:
            future = SaveFuture(path)
            future.set_result(SaveReport(path=path, step=number))
            self._restored = number, future

    def moved_to(self, number: int) -> None:
        """Takes note of where the run is: what it comes to later under an older number is not the same."""
        self._saved, self._restored = (
            None if outcome is None or outcome[0] != number else outcome
            for outcome in (self._saved, self._restored)
        )

    def outcome(self, number: int | None) -> SaveFuture | None:
        """The outcome of the save of this number, if the run is there: it was saved last, or restored."""
        for outcome in (self._saved, self._restored):
            if outcome is not None and outcome[0] == number:
                future = outcome[1]
                if not future.done() or futures.Future.exception(future) is None:
                    return future
        return None

    def failed_after(self, path: str, error: Exception) -> None:
        """Takes account of a failure when the checkpoint was durable already."""
        self._failed.append(writer.fail(f"{path} (it is durable: what failed is retention, after it)", error))

    def numbers(self) -> list[int]:
        """The numbers that are taken by saves under way."""
        self._reap()
        return [pending.number for pending in self._pending]

    def under_way(self) -> list[SaveFuture]:
        return [pending.future for pending in list(self._pending) if not pending.future.done()]

    def settle(self) -> None:
        """Returns when none is under way."""
        futures.wait(self.under_way())

    def raise_failed(self) -> None:
        """Raises what made saves fail and nobody has looked at, once."""
        self._reap()
        failed, self._failed = self._failed, []
        told = self._told_of = [future for future in failed if not future.seen]
        errors = [future.exception() for future in told]
        if not errors or errors[0] is None:
            return
        errors[0].add_note(f"It was saving {told[0].path}, in the background.")
        for future, other in zip(told[1:], errors[1:], strict=True):
            errors[0].add_note(f"Saving {future.path} failed as well: {other}")
        raise errors[0]

    def unsee(self) -> None:
        """What was raised last was not seen after all."""
        for future in self._told_of:
            future.seen = False

    def _reap(self) -> None:
        """Takes note of the saves that have ended."""
        for pending in [item for item in self._pending if item.future.done()]:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._pending.remove(pending)
                if futures.Future.exception(pending.future) is not None:
                    self._failed.append(pending.future)
                    if self.last is pending.last:
                        self.last = None  # nothing was saved, so the next call is due
