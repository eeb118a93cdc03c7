"""Key patterns: ``*`` stands for one name (or for part of one), ``**`` for any number of names.

A pattern names a leaf or everything below it. ``*`` never stands for `SLOT_MARK`, so that
``net/*`` names parameters; their slots are below them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from jaxckpt.graph.model import ROOT, SLOT_MARK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: TensorFlow's ending of a variable's key: accepted, never written.
TENSORFLOW_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_MARK = re.escape(SLOT_MARK)
_ONE = rf"/((?!{_MARK}(?:/|$))[^/]+)"
_MANY = r"((?:/[^/]+)*?)"
_NUMBER = re.compile(r"(?<!\.)\.\d+(?=/|$)")
_FIRST = re.compile(r"(?<!\.)\.1(?=/|$)")
#: The stars of an `anchored` template; a `**` takes its slash along, as the pattern's does.
_STARS = re.compile(r"/\*\*(?=/|$)|\*")


def anchored(key: str) -> str:
    """The key with a slash before each name; the root is the empty text."""
    return "" if key in ("", ROOT) else f"/{key}"


def plain(text: str) -> str:
    """The reverse of `anchored`."""
    return text[1:] or ROOT


def depth(key: str) -> int:
    """How many names a key has."""
    return anchored(key).count("/")


def numbered(key: str) -> bool:
    """Whether a key or pattern says which state of a class it means (``TraceState.2``)."""
    return _NUMBER.search(key) is not None


def normal(text: object, option: str) -> str:
    """A key or pattern as a user wrote it, in the one spelling that is compared.

    Raises:
        TypeError: it is no string.
        ValueError: a name in it is empty.
    """
    if not isinstance(text, str):
        raise TypeError(f"{option}: a key pattern is a string, not {text!r}")
    key = text.removesuffix(TENSORFLOW_SUFFIX).strip("/")
    if "//" in key:
        raise ValueError(f"{option}: {text!r} has an empty name in it (an empty dict key is spelled .E)")
    return key or ROOT


class Found(NamedTuple):
    """A match: what the stars stood for (of ``**`` with leading slashes), how many names, what is below."""

    stars: tuple[str, ...]
    names: int
    rest: str


class Pattern(Struct, frozen=True, kw_only=True):
    """One key pattern.

    Attributes:
        text: as the user wrote it, but for slashes at its ends.
        stars: its stars in order, each "*" or "**".
        regex: matches `anchored` keys at their start.
        first: whether it asked for ``.1``, the first state of a class and no other.
    """

    text: str
    stars: tuple[str, ...]
    regex: re.Pattern[str]
    first: bool = False

    @classmethod
    def of(cls, text: object, option: str) -> Pattern:
        """Compiles a pattern; ``option`` names the argument in errors."""
        written = normal(text, option)
        # The first state of a class is spelled without its number.
        key = _FIRST.sub("", written)
        source, stars = _source(key)
        regex = re.compile(rf"{source}(?=/|$)", re.DOTALL)
        return cls(text=written, stars=stars, regex=regex, first=key != written)

    @property
    def key(self) -> str:
        """The text without ``.1``: the key itself if there is no star."""
        return _FIRST.sub("", self.text)

    @property
    def marked(self) -> bool:
        """Whether it spells out a slot's key."""
        return SLOT_MARK in self.text.split("/")

    def find(self, key: str) -> Found | None:
        """How the pattern names ``key`` or something above it."""
        text = anchored(key)
        match = self.regex.match(text)
        if match is None:
            return None
        end = match.end()
        return Found(match.groups(), text.count("/", 0, end), text[end:])

    def covers(self, key: str) -> bool:
        """Whether it names the leaf or something above it."""
        return self.regex.match(anchored(key)) is not None


def _source(key: str) -> tuple[str, tuple[str, ...]]:
    parts: list[str] = []
    stars: list[str] = []
    for name in anchored(key).split("/")[1:]:
        if name in ("*", "**"):
            stars.append(name)
            parts.append(_ONE if name == "*" else _MANY)
        else:
            pieces = [re.escape(piece) for piece in name.split("*")]
            stars.extend("*" * (len(pieces) - 1))
            parts.append("/" + "([^/]*)".join(pieces))
    return "".join(parts), tuple(stars)


class Template(Struct, frozen=True, kw_only=True):
    """The other side of a rule: what the stars stood for goes where its stars are.

    Attributes:
        text: the key with its stars; the first state of a class has no number in it.
        numbered: whether it was written with the number of a state.
    """

    text: str
    numbered: bool

    @classmethod
    def of(cls, text: object, pattern: Pattern, option: str) -> Template:
        """Raises ValueError if it has a star for which the pattern has none."""
        written = normal(text, option)
        key = _FIRST.sub("", written)
        found = [star.lstrip("/") for star in _STARS.findall(anchored(key))]
        for star in ("*", "**"):
            if found.count(star) > pattern.stars.count(star):
                raise ValueError(
                    f"{option}: {key!r} has more {star!r} than {pattern.text!r}: what do they stand for?"
                )
        return cls(text=key, numbered=numbered(written))

    def fill(self, pattern: Pattern, stars: Sequence[str], rest: str = "") -> str:
        """The key for one match of ``pattern``."""
        one = iter([value for star, value in zip(pattern.stars, stars, strict=True) if star == "*"])
        many = iter([value for star, value in zip(pattern.stars, stars, strict=True) if star == "**"])
        # One pass: what a star stood for may hold a literal star itself.
        text = _STARS.sub(lambda star: next(one if star.group() == "*" else many), anchored(self.text))
        return plain(text + rest)


def covering(patterns: Iterable[Pattern]) -> re.Pattern[str] | None:
    """One expression that matches the `anchored` keys that any of the patterns names."""
    sources = [pattern.regex.pattern for pattern in patterns]
    return re.compile("|".join(sources), re.DOTALL) if sources else None
