"""What was found damaged while values were read, and the error that says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TAIL = "the tail of the chunk table"


@dataclass(slots=True, kw_only=True)
class Damage:
    """Collects damage from several threads.

    Attributes:
        directory: the checkpoint.
        names: gives the keys of the leaves of an entry.
        entries: the damaged ones.
        files: the damaged ones, relative to the checkpoint.
        reasons: in words, in the order of being found.
    """

    directory: str
    names: Callable[[int], Sequence[str]]
    entries: set[int] = field(default_factory=set[int])
    files: set[str] = field(default_factory=set[str])
    reasons: list[str] = field(default_factory=list[str])

    def add(self, entry: int, reason: str, file: str = "") -> None:
        """Notes that an entry cannot be read, and in which file that lies."""
        self.entries.add(entry)
        self.reasons.append(reason)
        if file and file != TAIL:
            self.files.add(file)

    def check(self) -> None:
        """Raises `CorruptCheckpointError` if there is any."""
        if not self.entries:
            return
        keys: list[str] = []
        for entry in sorted(self.entries):
            keys += self.names(entry)
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        raise CorruptCheckpointError(
            f"{self.directory} is damaged: {self.reasons[0]}. Leaves that cannot be read: {shown}. "
            "Restore another checkpoint, or ask for the others only, with `...` in the target for these",
            keys=keys,
            files=sorted(self.files),
        )


def number_only(entry: int) -> tuple[str]:
    """The name of an entry of which no more is known."""
    return (f"entry {entry}",)


def cut_off(name: str, size: int) -> str:
    """The reason for a file of that size, which is negative where there is none."""
    return f"{name} is missing" if size < 0 else f"{name} is cut off at {size} bytes"


def differs(name: str, offset: int, length: int) -> str:
    """The reason for bytes that are not those that were written."""
    return f"{name} differs from its digest at bytes {offset} to {offset + length}"
