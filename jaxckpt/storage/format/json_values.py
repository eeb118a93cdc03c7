"""Any JSON value, exactly: metadata and metrics inside a manifest. Pure.

What JSON has no word for is an object with one key that begins with ``$``: NaN and infinities (``$float``),
huge integers (``$int``), texts with lone surrogates (``$str``), objects whose own keys need care (``$dict``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from jaxckpt.storage.format.documents import escape_text, unescape_text

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_DEPTH = 200


def freeze_json(value: Any, where: str = "metadata") -> Any:
    """A JSON value in a form that survives msgspec: NaN, infinities, huge integers, lone surrogates.

    Raises:
        TypeError: it holds something else than None, bool, int, float, str, list, tuple and dict with string
            keys; the message names the path.
    """
    return _freeze(value, where, 0)


def _freeze(value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise TypeError(f"{where} is nested deeper than {_MAX_DEPTH} levels, or holds itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _freeze_text(str(value))
    if isinstance(value, int | float):
        return _freeze_number(value)
    if isinstance(value, dict):
        return _freeze_dict(cast("dict[Any, Any]", value), where, depth)
    if isinstance(value, list | tuple):
        items = enumerate(cast("list[Any] | tuple[Any, ...]", value))
        return [_freeze(item, f"{where}[{i}]", depth + 1) for i, item in items]
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which JSON has no form for: "
        "use None, bool, int, float, str, list and dict with string keys"
    )


def _freeze_number(value: float) -> Any:
    if isinstance(value, int):
        number = int(value)
        return number if -(1 << 63) <= number < 1 << 63 else {"$int": hex(number)}
    return float(value) if math.isfinite(value) else {"$float": float(value).hex()}


def _freeze_dict(value: dict[Any, Any], where: str, depth: int) -> Any:
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{where} has the key {key!r}: JSON has only string keys")
    items = [(str(key), _freeze(item, f"{where}[{key!r}]", depth + 1)) for key, item in value.items()]
    if any(_needs_escape(key) for key, _ in items):
        return {"$dict": [[_freeze_text(key), item] for key, item in items]}
    return dict(items)


def _needs_escape(text: str) -> bool:
    return text.startswith("$") or _freeze_text(text) is not text


def _freeze_text(text: str) -> Any:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return {"$str": escape_text(text)}
    return text


def thaw_json(value: Any) -> Any:
    """The inverse of `freeze_json`.

    Raises:
        ValueError: a marked object is none that `freeze_json` makes.
    """
    if isinstance(value, list):
        return [thaw_json(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value)
    thaw = _THAW.get(next(iter(items))) if len(items) == 1 else None
    if thaw is not None:
        try:
            return thaw(next(iter(items.values())))
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
    return {key: thaw_json(item) for key, item in items.items()}


_THAW: dict[str, Callable[[Any], Any]] = {
    "$int": lambda text: int(text, 16),
    "$float": float.fromhex,
    "$str": unescape_text,
    "$dict": lambda pairs: {thaw_json(key): thaw_json(item) for key, item in pairs},
}
