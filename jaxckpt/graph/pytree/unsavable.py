"""What cannot be saved: why, and what to do instead."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import io
import os
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class UnsavableError(Exception):
    """Why a leaf cannot be saved and what to do: the message without the key."""


def spell(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


_REMEDIES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((enum.Enum,), "save its .value (the class would be lost)"),
    ((set, frozenset), "make it a sorted list or tuple"),
    (
        (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType),
        "use an iterator with get_state and set_state",
    ),
    ((io.IOBase,), "save its path and position, and open it again"),
    ((np.random.Generator,), "save generator.bit_generator.state, a dict"),
    ((np.random.BitGenerator,), "save its .state, a dict"),
    ((random.Random,), "save its .getstate()"),
    ((bytearray, memoryview), "make it bytes"),
    ((range,), "make it a list, or save start, stop and step"),
    (
        (datetime.date, datetime.time, datetime.timedelta),
        "use .isoformat(), or numpy.datetime64 or timedelta64",
    ),
    ((decimal.Decimal, fractions.Fraction, os.PathLike), "use str(...)"),
    ((bool, int, float, complex, str, bytes), "its type would be lost: convert it to the plain Python type"),
    (
        (dict, list, tuple, Mapping),
        "jax does not know it as a container: register it as a pytree, or convert it",
    ),
)


def unsavable(value: Any) -> UnsavableError:
    """Why a leaf of no kind that can be saved is refused."""
    cls = type(value)
    remedy = next((text for classes, text in _REMEDIES if isinstance(value, classes)), None)
    if remedy is None and hasattr(cls, "__dataclass_fields__"):
        remedy = "register the class with jax.tree_util.register_dataclass"
    if remedy is None and isinstance(value, Iterator):
        remedy = "give it get_state and set_state"
    if remedy is None and hasattr(value, "__array__"):
        remedy = "convert it with numpy.asarray(...)"
    remedy = remedy or "register its class as a pytree, give it get_state and set_state, or leave it out"
    article = "an" if spell(cls)[0].lower() in "aeiou" else "a"
    return UnsavableError(f"{article} {spell(cls)} cannot be saved; {remedy}")
