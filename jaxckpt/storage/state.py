"""What a directory of checkpoints holds, and the file ``checkpoint`` in it.

The manifests are the authority. The state file (JSON, replaced atomically) saves reading them again, and
remembers what no manifest can once its checkpoint is deleted: the highest number and sequence ever used. It
may be lost or torn at any time. Names in it are relative, so that a directory can be moved.
"""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import msgspec

from jaxckpt.errors import CorruptCheckpointError, CorruptCheckpointWarning, UnsupportedFormatError
from jaxckpt.storage import directory as directories
from jaxckpt.storage.format.head import read_head
from jaxckpt.storage.manifest import NAME as MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterable

FILE = "checkpoint"
_FORMAT = "jaxckpt state"
_VERSION = 1
#: TensorFlow's ``CheckpointState`` as a text proto (``tensorflow/python/training/checkpoint_state.proto``).
_TENSORFLOW = re.compile(rb"\s*(all_)?model_checkpoint_path\w*\s*:")
#: What a checkpoint of ours has besides its manifest, and no other format has.
_TRACES = ("chunks.process_0",)
#: What it has, and may have in common with others.
_SIGNS = (*_TRACES, "manifest.ocdbt", "_METADATA", "commit_success.txt")
_NUMBERED = re.compile(r"-\d+$")
#: How often a directory is listed again when something was deleted meanwhile.
_SCANS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint, as far as listing needs to know it.

    Attributes:
        name: of its directory.
        stamp: inode of the directory; inode, size and time of change (ns) of its manifest, or zeros. While
            these are the same the row need not be read again.
        sequence: place in the order of commits; None where that is not known (its manifest is unreadable).
        step: the step that it was saved as, if any.
        number: the highest number that had been used in the directory when it was saved.
        writer: "manager" or "hand".
        time: of the commit, in seconds since the epoch.
        metrics: as given at the save.
        metadata: as given at the save.
        nbytes: bytes of its values.
        nbytes_shared: how many of them it has in common with other checkpoints.
        damage: what is wrong with its manifest; empty when nothing is.
        unsupported: whether it is a later release's, so that nothing else is known.
    """

    name: str
    stamp: tuple[int, ...]
    sequence: int | None = None
    step: int | None = None
    number: int = 0
    writer: str = ""
    time: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    metadata: Any = None
    nbytes: int = 0
    nbytes_shared: int = 0
    damage: str = ""
    unsupported: bool = False

    @property
    def sound(self) -> bool:
        """Whether a manager wrote it, and its manifest could be read."""
        return self.writer == "manager" and not self.damage and not self.unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a directory holds.

    Attributes:
        highest: the highest number ever used in it.
        sequence: the highest sequence number ever used in it.
        rows: its checkpoints, oldest commit first.
    """

    highest: int = 0
    sequence: int = 0
    rows: tuple[Row, ...] = ()


def number_of(name: str, prefix: str) -> int | None:
    """The number N of a name ``prefix-N``, or None for any other name (``prefix-007``, too)."""
    if not name.startswith(f"{prefix}-"):
        return None
    digits = name[len(prefix) + 1 :]
    return int(digits) if digits.isascii() and digits.isdigit() and f"{int(digits)}" == digits else None


def next_number(state: State, names: Iterable[str], prefix: str, pending: Iterable[int] = ()) -> int:
    """One more than the highest number ever used.

    Args:
        state: of the directory.
        names: everything that is in the directory now; what is called ``prefix-N`` takes N.
        prefix: of the names to come.
        pending: numbers of saves that are under way.
    """
    taken = [number for name in names if (number := number_of(name, prefix)) is not None]
    return max(state.highest, 0, *taken, *pending) + 1


def view(directory: str) -> State:
    """What the directory holds now; nothing where there is none. Reads the state file and, of those that
    it does not know, the manifests; writes nothing.
    """  # noqa: D205
    return scan(directory, load(directory))


def load(directory: str) -> State:
    """What the state file says; empty where it is missing or another program's.

    A torn one is warned about, and what it knew is found again from the manifests.
    """
    try:
        data = _read(os.path.join(directory, FILE))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return State()
    if _TENSORFLOW.match(data):
        return State()
    try:
        document = json.loads(data)
        if document["format"] != _FORMAT:
            raise ValueError("another format")
        if document["version"] != _VERSION:  # a later release's: nothing of it is needed for reading
            return State()
        return State(
            highest=int(document["highest"]),
            sequence=int(document["sequence"]),
            rows=tuple(_decode(row) for row in document["checkpoints"]),
        )
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        warnings.warn(
            f"{os.path.join(directory, FILE)} is damaged; what it said is read from the checkpoints instead",
            CorruptCheckpointWarning,
            stacklevel=2,
        )
        return State()


def refuse_tensorflow(directory: str) -> None:
    """Raises `UnsupportedFormatError` where the state file is TensorFlow's: it is never written there."""
    try:
        data = _read(os.path.join(directory, FILE))
    except OSError:
        return
    if _TENSORFLOW.match(data):
        raise UnsupportedFormatError(
            f"{directory} belongs to TensorFlow ({os.path.join(directory, FILE)} is its state file) and is "
            "never written to: use a directory of your own"
        )


def check_ours(directory: str) -> None:
    """Raises `UnsupportedFormatError` where the state file is somebody else's and must not be replaced."""
    path = os.path.join(directory, FILE)
    try:
        data = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except IsADirectoryError:
        raise UnsupportedFormatError(
            f"{path} is a directory, where a manager keeps its state file: "
            "give the manager a directory of its own"
        ) from None
    refuse_tensorflow(directory)
    try:
        document = json.loads(data)
        later = document["format"] == _FORMAT and document["version"] > _VERSION
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # torn: it is written anew
    if later:
        raise UnsupportedFormatError(f"{path} was written by a later release: upgrade jaxckpt")


#: The lines of the state file that were written last, by name; each with the row that it says.
Lines = dict[str, tuple[Row, str]]


def store(directory: str, state: State, lines: Lines | None = None) -> None:
    """Replaces the state file.

    Args:
        directory: of checkpoints.
        state: what it says from now on.
        lines: of the last call; what is still the same is not encoded again. They become those of this one.
    """
    lines = {} if lines is None else lines
    old = dict(lines)
    lines.clear()
    whole = [row.name for row in state.rows if not row.damage]
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "highest": state.highest,
        "sequence": state.sequence,
        "latest": whole[-1] if whole else None,
    }
    # A line for each: easy to read, and unlike `indent=` it leaves the work to the encoder in C.
    for row in state.rows:
        before = old.get(row.name)
        lines[row.name] = before if before and before[0] is row else (row, json.dumps(_encode(row)))
    rows = ",\n".join(line for _, line in lines.values())
    text = f'{json.dumps(document)[:-1]}, "checkpoints": [\n{rows}\n]}}\n'
    directories.replace_file(os.path.join(directory, FILE), text.encode())


def scan(directory: str, known: State, *, strict: bool = True, quick: bool = False) -> State:
    """What the directory holds now.

    Args:
        directory: of checkpoints; it may be missing.
        known: what was known before; manifests that have not changed since are not read.
        strict: whether it matters that something that may be a checkpoint cannot be looked at.
        quick: believe what is known of a manager's checkpoint as long as its directory is the same one, so
            that damage since is not seen.

    Raises:
        OSError: with ``strict``, a checkpoint cannot be looked at.
    """
    rows: list[Row] = []
    for _ in range(_SCANS):
        rows, gone = _scan_once(directory, {row.name: row for row in known.rows}, strict, quick)
        if not gone:  # else by its writer's retention, and what made it old may not have been seen yet
            break
    rows.sort(key=order)
    return State(
        highest=max(known.highest, *(max(row.step or 0, row.number) for row in rows), 0),
        sequence=max(known.sequence, *(row.sequence or 0 for row in rows), 0),
        rows=tuple(rows),
    )


def _scan_once(directory: str, known: Mapping[str, Row], strict: bool, quick: bool) -> tuple[list[Row], bool]:
    """The rows, and whether something was deleted between being listed and being looked at."""
    rows: list[Row] = []
    gone = False
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return rows, gone
    for entry in entries:
        before = known.get(entry.name)
        if quick and before is not None and before.sound and before.stamp[0] == entry.inode():
            # Only its manager replaces it, by another directory. Of one that anybody may replace again and
            # again the inode may be used again, too.
            rows.append(before)
        elif not entry.name.startswith(".") and entry.is_dir() and not _is_alias(entry, directory):
            try:
                row = look(directory, entry.name, before, inode=entry.inode())
            except OSError:
                if strict and _NUMBERED.search(entry.name):
                    raise
                continue  # lost+found and the like
            if row is not None:
                rows.append(row)
            else:
                gone = gone or not os.path.lexists(entry.path)
    return rows, gone


def next_sequence(directory: str) -> int:
    """The sequence number of a checkpoint that is committed now: one more than the highest ever used."""
    return scan(directory, load(directory), strict=False).sequence + 1


def is_checkpoint(path: str) -> bool:
    """Whether a checkpoint of ours is at this path, be it damaged."""
    return any(os.path.exists(os.path.join(path, name)) for name in (MANIFEST, *_TRACES))


def order(row: Row) -> tuple[object, ...]:
    """Sorts by commit. One whose place is unknown counts as the newest, so that it is never just ignored."""
    return row.sequence is None, row.sequence or 0, row.time, row.name


def read_row(path: str) -> Row:
    """One checkpoint from its manifest.

    Raises:
        CorruptCheckpointError: the manifest is damaged.
        UnsupportedFormatError: it is a later release's.
        FileNotFoundError: there is none.
    """
    stamp = _stamp(path)
    files = read_head(path)
    return Row(
        name=os.path.basename(path),
        stamp=stamp,
        sequence=files.sequence,
        step=files.step,
        number=files.save_counter or 0,
        writer=files.writer,
        time=files.committed,
        metrics=files.metrics,
        metadata=files.metadata,
        nbytes=files.nbytes,
        nbytes_shared=files.nbytes_shared,
    )


def look(directory: str, name: str, known: Row | None, *, inode: int = 0) -> Row | None:
    """The row of one directory, or None when it is no checkpoint of ours (or gone meanwhile).

    Args:
        directory: where it is.
        name: of the checkpoint.
        known: what was known before; the same object is returned while nothing has changed.
        inode: of the checkpoint's directory, as far as a listing tells.
    """
    path = f"{directory}/{name}"
    same = known is not None and known.stamp[0] == inode
    try:
        stamp = _stamp(path, inode if same else 0)
    except FileNotFoundError:
        return _without_manifest(path, name, known)
    if known is not None and known.stamp == stamp and not known.damage and not known.unsupported:
        return known
    try:
        return read_row(path)
    except FileNotFoundError:
        return None
    except UnsupportedFormatError:
        return Row(name=name, stamp=stamp, unsupported=True)
    except CorruptCheckpointError as error:
        if known is None and not any(os.path.exists(os.path.join(path, sign)) for sign in _SIGNS):
            return None  # another program's graph.json
        return _damaged(name, stamp, str(error), known)


def _without_manifest(path: str, name: str, known: Row | None) -> Row | None:
    try:
        inode = os.stat(path).st_ino
    except FileNotFoundError:
        return None
    if not is_checkpoint(path) and (known is None or known.stamp[0] != inode):
        return None
    return _damaged(name, (inode, 0, 0, 0), f"{os.path.join(path, MANIFEST)} is missing", known)


def _damaged(name: str, stamp: tuple[int, ...], damage: str, known: Row | None) -> Row:
    # The state file still knows where it belongs, if it is the same directory that it was.
    if known is not None and known.stamp[0] == stamp[0]:
        return replace(known, stamp=stamp, damage=damage)
    return Row(name=name, stamp=stamp, damage=damage)


def _stamp(path: str, inode: int = 0) -> tuple[int, ...]:
    status = os.stat(f"{path}/{MANIFEST}")
    return inode or os.stat(path).st_ino, status.st_ino, status.st_size, status.st_mtime_ns


def _is_alias(entry: os.DirEntry[str], directory: str) -> bool:
    """Whether it is a link to another checkpoint of the same directory (``latest -> ckpt-5``)."""
    if not entry.is_symlink():
        return False
    return os.path.dirname(os.path.realpath(entry.path)) == os.path.realpath(directory)


def _encode(row: Row) -> dict[str, Any]:
    # Not asdict: metadata may be deep, and needs no copy.
    document = {item.name: getattr(row, item.name) for item in fields(row)}
    document["metrics"] = {name: value.hex() for name, value in row.metrics.items()}  # JSON has no NaN
    return document


def _decode(document: dict[str, Any]) -> Row:
    metrics = {str(name): float.fromhex(value) for name, value in document["metrics"].items()}
    row = msgspec.convert({**document, "metrics": metrics}, Row)
    if len(row.stamp) != 4 or "/" in row.name or row.name.startswith("."):
        raise ValueError("no row")
    return row


def _read(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a directory; or a pipe, on which `open` would wait for ever
        raise IsADirectoryError(path)
    with open(path, "rb") as file:
        return file.read()
