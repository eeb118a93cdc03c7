"""Restoring: match by name, read what is asked for, build what the target is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from jaxckpt.fill import fill_matched, own_value
from jaxckpt.graph.collector import paused
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.match import match
from jaxckpt.graph.rules import Rules
from jaxckpt.graph.status import RestoreStatus
from jaxckpt.progress import Progress, shown
from jaxckpt.reader import CheckpointReader, PathLike, open_exact
from jaxckpt.restored import Restored, State
from jaxckpt.saved import restore_saved

Patterns = str | Iterable[str]
Rename = Mapping[str, str | None] | Callable[[str], str | None] | None
Transform = Mapping[str, tuple[str | tuple[str, ...], Callable[..., Any]]] | None


def restore(
    path: PathLike | CheckpointReader | None,
    target: Any = None,
    *,
    at: str = "",
    rename: Rename = None,
    transform: Transform = None,
    fresh: Patterns = (),
    partial: bool | Patterns = False,
    cast: bool | Patterns = False,
    skip_slots: bool = False,
    sharding: Any = None,
    memory_limit: int | None = None,
    progress: Progress = None,
) -> Restored:
    """Restores a pytree by name, as in ``tree, status = jaxckpt.restore(path, target)``.

    The target decides: its structure, which leaves are read, and each result's type. Strict by default:
    every leaf of the target must be in the checkpoint with its shape and dtype.

    Args:
        path: a checkpoint, a `CheckpointReader`, or None, which gives the target back.
        target: a pytree of arrays or `jax.ShapeDtypeStruct`s, Python values, iterators; ``...`` is not
            asked for. None restores the saved structure.
        at: the key of the saved node that the target is matched from.
        rename: saved prefix -> target prefix, ``*`` for one name, None to drop; or a function of the key.
        transform: target pattern -> (saved pattern or a tuple of them, function of host arrays).
        fresh: key patterns of leaves that keep the target's own value, whatever was saved.
        partial: True, or key patterns: leaves that are not in the checkpoint keep the target's own value.
        cast: True, or key patterns: a float becomes another float, an integer another that holds it.
        skip_slots: leaves slots, and the counts that belong to them, as they are in the target.
        sharding: without a target, where arrays go: a `jax.sharding.Sharding`, a `Mesh` (the saved axes on
            it, by name), a function of
            (key, ShapeDtypeStruct), or `numpy.ndarray` for numpy.
        memory_limit: bytes of host memory for what is read and not yet on its device; if not given 32 MiB
            for each core, from 64 to 512. A larger array is held alone. Arrays of numpy, and large or many
            ones on a CPU, are read right into the result and need none.
        progress: called with (bytes done, bytes in all), from (0, all) to (all, all) with a step for each 4
            MiB or more, from any thread, never by two at once; or True for a bar in a terminal or notebook.

    Raises:
        CheckpointNotFoundError: nothing is there.
        RestoreError: the target does not fit; ``problems`` lists every leaf. Nothing was read or changed.
        CorruptCheckpointError: bytes that were needed are not what was written.
    """
    if target is None:
        given = {
            "rename": rename, "transform": transform, "fresh": fresh, "partial": partial, "cast": cast,
            "skip_slots": skip_slots,
        }  # fmt: skip
        _refuse_rules(given)
        return restore_saved(path, at, sharding, memory_limit, progress)
    if sharding is not None:
        raise ValueError(
            "the target decides where its arrays go: sharding= is for a restore without a target"
        )
    rules = Rules.of(
        at=at,
        rename=rename,
        transform=transform,
        fresh=fresh,
        partial=partial,
        cast=cast,
        skip_slots=skip_slots,
    )
    with nullcontext() if transform else paused():  # what a function of the caller's makes may be garbage
        return _restore_into(path, target, rules, memory_limit, progress)


def _restore_into(
    path: PathLike | CheckpointReader | None,
    target: Any,
    rules: Rules,
    memory_limit: int | None,
    progress: Progress,
) -> Restored:
    flat = flatten(target, target=True)
    own = tuple([own_value(flat, index) for index in range(len(flat.values))])
    if path is None:
        return Restored(State.nothing(flat, own, rules))
    reader = path if isinstance(path, CheckpointReader) else open_exact(path)
    found = match(reader.graph, flat.graph, rules)
    found.check(reader.path)
    wanted = [index for index, fill in enumerate(found.fills) if fill.why == "restored"]
    with shown(progress, "Restoring") as report:
        values, found = fill_matched(
            reader, flat, found, wanted, own, memory_limit=memory_limit, progress=report
        )
    return Restored(
        State(
            flat=flat,
            values=values,
            status=found.status,
            reader=reader,
            rules=rules,
            memory_limit=memory_limit,
        )
    )


def match_target(reader: CheckpointReader, target: Any, **rules: Any) -> RestoreStatus:
    """The dry run: what a restore would do.

    Raises:
        RestoreError: a leaf of the target has another kind, shape or dtype.
    """
    rules.setdefault("partial", True)
    found = match(reader.graph, flatten(target, target=True).graph, Rules.of(**rules))
    found.check(reader.path)
    return found.status


def _refuse_rules(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None and value is not False and value != ():
            raise ValueError(
                f"{name}= speaks about a target: give one, or restore the saved structure without it"
            )
