"""When a manager saves: pure decisions on `save_every`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral

from jaxckpt.storage.retention import positive_interval

SaveEvery = int | timedelta | Callable[[int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastSave:
    """The last save that a manager accepted.

    Attributes:
        step: its step.
        time: when, in seconds of a clock that never goes back.
    """

    step: int
    time: float


def check_rule(rule: SaveEvery | None) -> SaveEvery | None:
    """``rule``, with a number of steps as an int; raises `TypeError` or `ValueError` for an invalid one."""
    if rule is None or callable(rule):
        return rule
    try:
        return positive_interval("save_every", rule)
    except TypeError:
        raise TypeError(
            f"save_every must be an int, a timedelta or a function of the step, not {rule!r}"
        ) from None


def is_due(rule: SaveEvery | None, *, step: int, last: LastSave | None, now: float) -> bool:
    """Whether a save is due.

    Args:
        rule: a number of steps: due when a multiple of it was passed since the last save, so that a loop
            in strides is not starved. A timedelta: due when that much time went by. A function: of the
            step. None: always. For the first two the first call is due.
        step: the step at hand.
        last: the last save, or None before the first.
        now: the time, by the clock of `LastSave.time`.
    """
    if rule is None:
        return True
    if isinstance(rule, timedelta):
        return last is None or now - last.time >= rule.total_seconds()
    if isinstance(rule, int):
        # Not "greater": after a rewind the steps start again below the last save.
        return last is None or step // rule != last.step // rule
    return bool(rule(step))


def as_step(step: object) -> int:
    """A step as an int: a Python, numpy or jax integer.

    Raises:
        TypeError: it is no integer.
        ValueError: it is negative.
    """
    try:
        if isinstance(step, bool):
            raise TypeError
        number = operator.index(step)  # pyright: ignore[reportArgumentType]  # what has no __index__ raises
    except TypeError:
        raise TypeError(f"step must be an integer, not {step!r}: save(tree, step=int(step))") from None
    if number < 0:
        raise ValueError(f"step must not be negative; it is {number}")
    return number


def refuse_integer(method: str, argument: str, value: object) -> None:
    """Raises `TypeError` for a tree or target that is an integer: most likely a step without its keyword."""
    if isinstance(value, Integral) and value is not True and value is not False:
        raise TypeError(
            f"the {argument} of {method} is the integer {value}; a step goes by keyword: "
            f"manager.{method}({argument}, step={value})"
        )
