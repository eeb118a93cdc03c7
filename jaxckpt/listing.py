"""The checkpoints of a directory: which there are, which is the newest, and waiting for the next one."""

from __future__ import annotations

import contextlib
import difflib
import os
import time
import warnings
from typing import TYPE_CHECKING, TypeVar

from jaxckpt.errors import (
    CheckpointNotFoundError,
    CheckpointWarning,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
)
from jaxckpt.storage import pins, state
from jaxckpt.storage.state import Row, State

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence

T = TypeVar("T")
PathLike = str | os.PathLike[str]

#: How often the newest is looked for again when it was deleted between listing and opening.
_RETRIES = 10
#: How often `checkpoints_iterator` looks for a new checkpoint.
POLL_SECONDS = 0.25


def is_checkpoint(path: PathLike) -> bool:
    """Whether a checkpoint of ours is at this path, be it damaged."""
    return state.is_checkpoint(os.fspath(path))


def latest_checkpoint(directory: PathLike) -> str | None:
    """Path of the newest checkpoint of a directory: the one that was committed last.

    Nothing that is still being written is ever named. One whose manifest is damaged is passed over with a
    `CorruptCheckpointWarning`.

    Args:
        directory: where a manager, or `save`, puts checkpoints. It may be missing.

    Returns:
        The path, or None where there is no checkpoint, so that ``restore(latest_checkpoint(d), target)``
        starts or resumes a run.

    Raises:
        CorruptCheckpointError: there are checkpoints, and none has a whole manifest.
    """
    folder = os.fspath(directory)
    row = newest(state.view(folder).rows, folder)
    return None if row is None else os.path.join(folder, row.name)


def newest(rows: Sequence[Row], directory: str) -> Row | None:
    """The last committed row whose manifest is whole; warns when that is not the last one.

    Args:
        rows: oldest commit first.
        directory: where they are, for the warning.

    Raises:
        CorruptCheckpointError: there are checkpoints, and none has a whole manifest.
    """
    passed: list[str] = []
    for row in reversed(rows):
        if not row.damage:
            warn_passed_over(passed, os.path.join(directory, row.name))
            return row
        passed.append(f"{os.path.join(directory, row.name)} ({row.damage})")
    if passed:  # never None: that would mean to start afresh
        raise CorruptCheckpointError(f"no checkpoint of {directory} is whole: {'; '.join(passed)}")
    return None


def warn_passed_over(passed: Sequence[str], taken: str, *, stacklevel: int = 3) -> None:
    """One `CorruptCheckpointWarning` for all that were passed over, if any."""
    if passed:
        warnings.warn(
            f"damaged, passed over: {'; '.join(passed)}. Taken instead: {taken}",
            CorruptCheckpointWarning,
            stacklevel=stacklevel + 1,
        )


class _GoneError(Exception):
    """A checkpoint was deleted between listing and opening."""


def take_newest(rows: Callable[[], Sequence[Row]], directory: str, attempt: Callable[[str], T]) -> T | None:
    """The result of ``attempt`` on the newest checkpoint that is whole, or None where there is no checkpoint.

    Damaged ones are passed over with one `CorruptCheckpointWarning`; whatever else ``attempt`` raises is
    raised.

    Args:
        rows: what there is, oldest commit first; asked again when the newest was deleted meanwhile.
        directory: where they are.
        attempt: called with a path.

    Raises:
        CorruptCheckpointError: there are checkpoints, and none is whole.
    """
    for _ in range(_RETRIES):
        found = rows()
        if not found:
            return None
        with contextlib.suppress(_GoneError):
            return _first_whole(found, directory, attempt)
    raise CheckpointNotFoundError(f"the checkpoints of {directory} are deleted faster than they are read")


def open_newest(directory: str, attempt: Callable[[str], T]) -> T | None:
    """`take_newest` of what a directory holds."""
    return take_newest(lambda: state.view(directory).rows, directory, attempt)


def _first_whole(rows: Sequence[Row], directory: str, attempt: Callable[[str], T]) -> T:
    damaged: list[CorruptCheckpointError] = []
    passed: list[str] = []
    for row in reversed(rows):
        path = os.path.join(directory, row.name)
        try:
            result = attempt(path)
        except CorruptCheckpointError as error:
            damaged.append(error)
            passed.append(f"{path} ({error})")
        except CheckpointNotFoundError:
            if os.path.isdir(path):
                raise
            raise _GoneError from None  # by its writer's retention: then there is a newer one
        else:
            warn_passed_over(passed, path, stacklevel=4)
            return result
    raise CorruptCheckpointError(
        f"no checkpoint of {directory} is whole: {'; '.join(passed)}",
        keys=[key for error in damaged for key in error.keys],
        files=[file for error in damaged for file in error.files],
    )


def not_found(path: PathLike) -> str:
    """A message for a path at which no checkpoint is: what there is, and what may have been meant."""
    path = os.path.abspath(os.fspath(path))
    parent, name = os.path.split(path)
    if os.path.isdir(path):
        inside = os.listdir(path)
        what = "is empty" if not inside else "holds no checkpoint"
        return f"{path} {what}"
    if os.path.lexists(path):
        return f"{path} is a file, not a checkpoint"
    if not os.path.isdir(parent):
        return f"{path} does not exist, and neither does {parent}"
    names = [row.name for row in state.view(parent).rows]
    if not names:
        return f"{path} does not exist; there is no checkpoint in {parent}"
    numbered = [other for other in names if state.number_of(other, name) is not None]
    if numbered:  # the prefix that was saved under, without the number
        return f"{path} does not exist. Did you mean {name!r} with its number, as in {numbered[-1]!r}?"
    listed = ", ".join(names[-10:])
    return f"{path} does not exist.{did_you_mean(name, names)} {parent} holds {listed}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest of these names, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def checkpoints_iterator(
    directory: PathLike,
    *,
    timeout: float | None = None,
    timeout_fn: Callable[[], bool] | None = None,
    min_interval: float = 0,
) -> Iterator[str]:
    """Yields the newest checkpoint of a directory again and again, as soon as there is another.

    For an evaluation beside a training run: what was committed while the last one was at work is skipped but
    for the newest. What is yielded is held until the next one is asked for (or the process dies), so that
    retention does not delete it meanwhile.

    Args:
        directory: of checkpoints; it may not exist yet.
        timeout: seconds to wait for a new checkpoint; None for ever.
        timeout_fn: asked when they are over: true ends the iteration, false waits as long again. Without it
            the iteration ends.
        min_interval: at least this many seconds lie between two yields.

    Yields:
        Paths.
    """
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout must not be negative; it is {timeout}")
    return _iterate(os.fspath(directory), timeout, timeout_fn, min_interval)


def _iterate(
    directory: str, timeout: float | None, timeout_fn: Callable[[], bool] | None, min_interval: float
) -> Iterator[str]:
    known = State()
    seen: set[tuple[object, ...]] = set()
    while True:
        found = _wait(directory, known, seen, timeout)
        if found is None:
            if timeout_fn is None or timeout_fn():
                return
            continue
        known, row = found
        seen = {_identity(old) for old in known.rows} & seen | {_identity(row)}
        start = time.monotonic()
        with _holding(directory, row.name) as there:
            if there:
                yield os.path.join(directory, row.name)
        pause = min_interval - (time.monotonic() - start)
        if there and pause > 0:
            time.sleep(pause)


def _wait(
    directory: str, known: State, seen: Collection[tuple[object, ...]], timeout: float | None
) -> tuple[State, Row] | None:
    until = None if timeout is None else time.monotonic() + timeout
    while True:
        # Not the state file: it is written some moments after the commit, and may be torn.
        known = state.scan(directory, known)
        whole = [row for row in known.rows if not row.damage]
        # After a deletion the newest may be one that was yielded before.
        if whole and _identity(whole[-1]) not in seen:
            return known, whole[-1]
        rest = POLL_SECONDS if until is None else until - time.monotonic()
        if rest <= 0:
            return None
        time.sleep(min(POLL_SECONDS, rest))


def _identity(row: Row) -> tuple[object, ...]:
    return row.name, row.stamp  # a step that was saved again is another checkpoint


@contextlib.contextmanager
def _holding(directory: str, name: str) -> Generator[bool]:
    """Holds a checkpoint; gives whether it is still there."""
    try:
        hold = pins.Hold(directory, name)
    except CheckpointNotFoundError:  # pruned just now; there is a newer one
        yield False
        return
    except OSError as error:
        warnings.warn(
            f"{directory} cannot be written to ({error}), so that nothing holds {name} while it is in use: "
            "the training run may delete it meanwhile",
            CheckpointWarning,
            stacklevel=4,
        )
        yield True
        return
    try:
        yield True
    finally:
        hold.release()
