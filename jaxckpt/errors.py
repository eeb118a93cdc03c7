"""Every error and warning of jaxckpt.

CheckpointError
├── CheckpointNotFoundError   (FileNotFoundError)  the only one that may mean "start fresh"
├── CheckpointExistsError     (FileExistsError)    the path is taken; ``overwrite=True`` replaces it
├── CorruptCheckpointError                         bytes differ from what was written; names keys and files
├── UnsupportedFormatError                         not a format, or not a version, that this release reads
├── UnsupportedLeafError      (TypeError)          a leaf that cannot be saved; names its key
├── DirectoryInUseError                            another live process writes to the directory
├── SaveError                 (OSError)            a write that failed: path, bytes wanted, cause
├── RestoreError              (ValueError)         target and checkpoint differ; lists every problem
└── RestoreAssertionError     (AssertionError)     an assertion on a restore status does not hold

CheckpointWarning             (UserWarning)
├── CorruptCheckpointWarning                       a damaged checkpoint was passed over for an older one
├── SlotsLeftOutWarning                            an optimizer was saved without its parameters
├── RestoreIgnoredWarning                          the result of a restore was thrown away
└── NewerCheckpointsWarning                        an older step was restored while later ones exist
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ProblemKind = Literal["missing", "kind", "shape", "dtype", "length", "ambiguous", "process_count"]
#: In this order: a leaf with several problems is reported under the first.
PROBLEM_KINDS: tuple[ProblemKind, ...] = (
    "missing",
    "kind",
    "shape",
    "dtype",
    "length",
    "ambiguous",
    "process_count",
)


class CheckpointError(Exception):
    """Base of every error that jaxckpt raises on purpose."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint is at that path."""

    def __str__(self) -> str:  # OSError would print only its errno fields
        return Exception.__str__(self)


class CheckpointExistsError(CheckpointError, FileExistsError):
    """The path of a new checkpoint is taken."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class CorruptCheckpointError(CheckpointError):
    """What is on disk is not what was written.

    Attributes:
        keys: keys of the damaged leaves, as far as they are known.
        files: damaged files, relative to the checkpoint.
    """

    def __init__(self, message: str, *, keys: Sequence[str] = (), files: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)
        self.files = tuple(files)


class UnsupportedFormatError(CheckpointError):
    """Not a checkpoint format, or not a version of it, that this release reads or writes."""


class UnsupportedLeafError(CheckpointError, TypeError):
    """A leaf that cannot be saved."""


class DirectoryInUseError(CheckpointError):
    """Another live process is the writer of the directory."""


class SaveError(CheckpointError, OSError):
    """A checkpoint could not be written; nothing of it is left on disk."""

    def __str__(self) -> str:
        return Exception.__str__(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason why a target cannot be restored.

    Attributes:
        key: key of the target's leaf or container.
        kind: see `ProblemKind`.
        saved: the checkpoint's side, in words ("float32[3, 4]").
        wanted: the target's side, in words.
        hint: what to do about it, or an empty string.
    """

    key: str
    kind: ProblemKind
    saved: str
    wanted: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.key}: {self.kind}: saved {self.saved}, wanted {self.wanted}"
        return f"{line}. {self.hint}" if self.hint else line


class RestoreError(CheckpointError, ValueError):
    """The target does not fit the checkpoint.

    Attributes:
        problems: every problem, in the target's order.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([message, *map(str, self.problems)]))


class RestoreAssertionError(CheckpointError, AssertionError):
    """An assertion on a `RestoreStatus` does not hold."""


class CheckpointWarning(UserWarning):
    """Base of every warning of jaxckpt."""


class CorruptCheckpointWarning(CheckpointWarning):
    """A damaged checkpoint was passed over."""


class SlotsLeftOutWarning(CheckpointWarning):
    """An optimizer was saved without the parameters that its slots belong to."""


class RestoreIgnoredWarning(CheckpointWarning):
    """The result of a restore was never looked at: a restore changes nothing in place."""


class NewerCheckpointsWarning(CheckpointWarning):
    """An older step was restored while later ones exist."""
