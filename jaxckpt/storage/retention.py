"""Which checkpoints of a directory go: a pure function. The manager acts on what it says."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Literal

Metrics = Mapping[str, float]
Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint of a directory, without its tree.

    Attributes:
        path: where it is.
        step: the number at the end of its name, or None for a name without one.
        sequence: its place in the order of commits in its directory; the highest is the newest.
        time: when it was committed, in seconds since the epoch by the clock of its writer.
        metrics: what the save was given, empty for none.
        metadata: the JSON value that the save was given.
        nbytes: bytes of its values.
        nbytes_shared: how many of them it has in common with other checkpoints.
        pinned: whether it is kept until it is unpinned.
        format: which format it has on disk.
    """

    path: str
    step: int | None = None
    sequence: int = 0
    time: float = 0.0
    metrics: Metrics = field(default_factory=lambda: MappingProxyType({}), hash=False)
    metadata: object = field(default=None, hash=False)
    nbytes: int = 0
    nbytes_shared: int = 0
    pinned: bool = False
    format: str = "jaxckpt"


Keep = Callable[[list[CheckpointInfo]], Iterable[CheckpointInfo]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is kept: the union of what the parts keep, the pinned ones, and always the newest.

    Attributes:
        max_to_keep: how many of the last ones; None for all.
        keep_best: how many of the best ones by ``metric``.
        metric: name of a metric, or a function of the metrics of one checkpoint.
        mode: whether the lowest ("min") or the highest ("max") is the best.
        keep_every: the multiples of this many steps, or one for each timedelta.
        keep: given the checkpoints that may go, oldest commit first, it returns those to keep.

    Raises:
        ValueError: a part is out of range, or ``keep_best`` has no metric and mode to go by.
        TypeError: a part has the wrong type.
    """

    max_to_keep: int | None = None
    keep_best: int = 0
    metric: str | Callable[[Metrics], float] | None = None
    mode: Mode | None = None
    keep_every: int | timedelta | None = None
    keep: Keep | None = None

    def __post_init__(self) -> None:
        if self.max_to_keep is not None:
            object.__setattr__(self, "max_to_keep", whole("max_to_keep", self.max_to_keep))
            if self.max_to_keep <= 0:
                raise ValueError(
                    f"max_to_keep must be at least 1, or None to keep all; it is {self.max_to_keep}"
                )
        object.__setattr__(self, "keep_best", whole("keep_best", self.keep_best))
        if self.keep_best < 0:
            raise ValueError(f"keep_best must not be negative; it is {self.keep_best}")
        if self.mode not in (None, "min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', not {self.mode!r}")
        if self.metric is not None and not isinstance(self.metric, str) and not callable(self.metric):
            raise TypeError(f"metric must be a name or a function of the metrics, not {self.metric!r}")
        if (self.metric is None) != (self.mode is None):
            raise ValueError(
                "metric= and mode= go together: say which metric, and whether 'min' or 'max' is best"
            )
        if self.keep_best and self.metric is None:
            raise ValueError(
                "keep_best needs metric= (a name, or a function of the metrics) and mode= ('min' or 'max')"
            )
        object.__setattr__(self, "keep_every", positive_interval("keep_every", self.keep_every))
        if self.keep is not None and not callable(self.keep):
            raise TypeError(f"keep must be a function of a list of CheckpointInfo, not {self.keep!r}")


def whole(name: str, value: object) -> int:
    """``value``, any integer, for an argument called ``name``; bools and floats raise `TypeError`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # pyright: ignore[reportArgumentType]  # what has no __index__ raises
    except TypeError:
        raise TypeError(f"{name} must be an int, not {value!r}") from None


def positive_interval(name: str, value: object) -> int | timedelta | None:
    """``value``, which is None, any integer or a timedelta; raises unless it is positive."""
    if value is None:
        return None
    interval = value if isinstance(value, timedelta) else whole(name, value)
    if (interval.total_seconds() if isinstance(interval, timedelta) else interval) <= 0:
        raise ValueError(f"{name} must be positive; it is {interval}")
    return interval


def in_order(checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    """The same, oldest commit first. Clock and name decide only between equal sequence numbers."""
    return sorted(checkpoints, key=lambda info: (info.sequence, info.time, info.path))


def removable(
    checkpoints: Iterable[CheckpointInfo],
    policy: Policy,
    *,
    owned: Collection[str],
    held: Collection[str] = (),
) -> list[CheckpointInfo]:
    """Which checkpoints go, oldest first.

    Args:
        checkpoints: all of a directory.
        policy: what is kept.
        owned: paths of those that a manager of this name wrote. Only they count, and only they go.
        held: paths that a reader holds at the moment.

    Raises:
        TypeError: ``metric`` gives a value that is no number, or ``keep`` something else than
            checkpoints of its list.
    """
    everything = in_order(checkpoints)
    ours = [info for info in everything if info.path in owned]
    if policy.max_to_keep is None or not ours:
        return []
    kept = {info.path for info in ours[-policy.max_to_keep :]}
    kept |= {info.path for info in ranked(ours, policy)[: policy.keep_best]}
    kept |= {info.path for info in _regular(ours, policy.keep_every)}
    kept |= _chosen(ours, policy.keep)
    kept |= {info.path for info in ours if info.pinned}
    kept |= {everything[-1].path, *held}
    return [info for info in ours if info.path not in kept]


def ranked(checkpoints: Sequence[CheckpointInfo], policy: Policy) -> list[CheckpointInfo]:
    """Best first; those without a finite metric come last. Between equals the later one is better."""
    if policy.metric is None:
        return []
    sign = 1.0 if policy.mode == "min" else -1.0
    rows: list[tuple[bool, float, int]] = []
    for place, info in enumerate(checkpoints):
        score = _score(info, policy.metric)
        rows.append((score is None, sign * (score or 0.0), -place))
    return [checkpoints[-place] for _, _, place in sorted(rows)]


def best(checkpoints: Iterable[CheckpointInfo], policy: Policy) -> CheckpointInfo | None:
    """The best one, or None when none has a finite metric."""
    if policy.metric is None:
        raise ValueError("the best checkpoint: by what? Give the manager metric= and mode='min' or 'max'")
    for info in ranked(in_order(checkpoints), policy):
        return info if _score(info, policy.metric) is not None else None
    return None


def _score(info: CheckpointInfo, metric: str | Callable[[Metrics], float]) -> float | None:
    """The value to rank by, None when it is missing, NaN or infinite."""
    if isinstance(metric, str):
        value: object = info.metrics.get(metric)
    else:
        try:
            value = metric(info.metrics)
        except KeyError:  # the function asked for a metric that this save did not have
            value = None
    if value is None:
        return None
    number = as_number("the result of metric=", value)
    return number if math.isfinite(number) else None


def as_number(name: str, value: object) -> float:
    """A real scalar as a float; numpy and jax scalars are known by their ``ndim`` and ``__float__``.

    Raises:
        TypeError: it is no number (a string, a complex number, an array that is no scalar).
    """
    scalar = not isinstance(value, str | bytes | bytearray | complex) and getattr(value, "ndim", 0) == 0
    # numpy would turn 0-d text, dates and complex numbers into floats, or drop the imaginary part.
    number = getattr(getattr(value, "dtype", None), "kind", "f") not in "USOMmc"
    if scalar and number and hasattr(value, "__float__"):
        try:
            return float(value)  # pyright: ignore[reportArgumentType]  # it has __float__
        except OverflowError:  # an integer beyond the floats
            return math.inf if value > 0 else -math.inf  # pyright: ignore[reportOperatorIssue]
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} must be a number, not {value!r} ({type(value).__name__})")


def as_scalars(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Metrics as floats.

    Raises:
        TypeError: one is no number; the message names it.
    """
    if metrics is None:
        return None
    for name in metrics:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # not all callers are checked
            raise TypeError(f"the name of a metric must be a string, not {name!r}")
    return {name: as_number(f"metric {name!r}", value) for name, value in metrics.items()}


def _regular(ours: Sequence[CheckpointInfo], every: int | timedelta | None) -> list[CheckpointInfo]:
    if every is None:
        return []
    if isinstance(every, int):
        return [info for info in ours if info.step is not None and info.step % every == 0]
    kept: list[CheckpointInfo] = []
    for info in ours:
        # The distance either way: a clock that was set back must not stop the keeping for as long.
        if not kept or abs(info.time - kept[-1].time) >= every.total_seconds():
            kept.append(info)
    return kept


def _chosen(ours: Sequence[CheckpointInfo], keep: Keep | None) -> set[str]:
    if keep is None:
        return set()
    known = {info.path for info in ours}
    chosen: set[str] = set()
    for info in keep(list(ours)):
        path = getattr(info, "path", None)
        if path not in known:
            raise TypeError(f"keep= must return checkpoints of the list it was given, not {info!r}")
        chosen.add(path)
    return chosen
