"""What a caller asks of a restore, checked and in one form: the options that match leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from jaxckpt.graph.matching.patterns import Pattern, Template, normal, numbered
from jaxckpt.graph.model import ROOT

RenameFunction = Callable[[str], "str | None"]
Rename = Mapping[str, "str | None"] | RenameFunction
#: Arguments of a rule's function: host arrays, lists of them where a ``*`` gathers, then the indices.
TransformFunction = Callable[..., object]


class RenameRule(Struct, frozen=True, kw_only=True):
    """A saved prefix and the target's; ``target=None`` drops it."""

    source: Pattern
    target: Template | None

    @property
    def numbered(self) -> bool:
        """Whether it says which state of a class it means."""
        return numbered(self.source.text) or (self.target is not None and self.target.numbered)

    def __str__(self) -> str:
        return f"{{{self.source.text!r}: {self.target.text if self.target else None!r}}}"


class TransformRule(Struct, frozen=True, kw_only=True):
    """Target leaves that are made of saved ones.

    Attributes:
        target: names the target's leaves.
        sources: name the saved leaves; a pattern's stars pair with the target's in order, those left over
            on the saved side gather.
        function: makes the value.
        single: whether the sources were given as one string.
    """

    target: Pattern
    sources: tuple[Pattern, ...]
    function: TransformFunction
    single: bool

    def __str__(self) -> str:
        names = self.sources[0].text if self.single else tuple(source.text for source in self.sources)
        return f"{{{self.target.text!r}: ({names!r}, ...)}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The options of one restore; make one with `Rules.of`.

    Attributes:
        at: the saved node that the target is matched from; "" for the root.
        renames: prefix rules, all applied at once, each to a saved key as it is seen from ``at``.
        rename_function: the function form of ``rename``.
        transforms: see `TransformRule`.
        fresh: target leaves that keep the target's value, whatever is saved.
        partial: whether, or which, target leaves may be absent from the checkpoint.
        cast: whether, or which, target leaves may be of another width of the same kind.
        skip_slots: whether optimizers start over.
        attach: whether the target grew by `attach`: a list may be shorter than the saved one, a leaf may
            be absent, and a pattern may name what is not there yet.
    """

    at: str = ""
    renames: tuple[RenameRule, ...] = ()
    rename_function: RenameFunction | None = None
    transforms: tuple[TransformRule, ...] = ()
    fresh: tuple[Pattern, ...] = ()
    partial: bool | tuple[Pattern, ...] = False
    cast: bool | tuple[Pattern, ...] = False
    skip_slots: bool = False
    attach: bool = field(default=False)

    @classmethod
    def of(
        cls,
        *,
        at: str = "",
        rename: Rename | None = None,
        transform: Mapping[str, tuple[str | tuple[str, ...], TransformFunction]] | None = None,
        fresh: str | Iterable[str] = (),
        partial: bool | str | Iterable[str] = False,
        cast: bool | str | Iterable[str] = False,
        skip_slots: bool = False,
        attach: bool = False,
    ) -> Rules:
        """Checks and compiles the options of `jaxckpt.restore`.

        Raises:
            TypeError, ValueError: an option is not of the form that `jaxckpt.restore` documents.
        """
        by_function = callable(rename)
        where = normal(at, "at")
        return cls(
            at="" if where == ROOT else where,
            renames=() if rename is None or by_function else _renames(rename),
            rename_function=rename if by_function else None,
            transforms=_transforms(transform or {}),
            fresh=_patterns(fresh, "fresh"),
            partial=partial if isinstance(partial, bool) else _patterns(partial, "partial"),
            cast=cast if isinstance(cast, bool) else _patterns(cast, "cast"),
            skip_slots=bool(skip_slots),
            attach=attach,
        )


def _patterns(value: object, option: str) -> tuple[Pattern, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable):
        raise TypeError(f"{option}= takes key patterns ({option}=('net/head',)), not {value!r}")
    items: Iterable[object] = value
    return tuple(Pattern.of(item, option) for item in items)


def _renames(rename: object) -> tuple[RenameRule, ...]:
    if not isinstance(rename, Mapping):
        raise TypeError(
            "rename= takes a mapping of saved prefixes to the target's ({'net/old': 'net/new'}) "
            f"or a function of a saved key, not {rename!r}"
        )
    items: Mapping[object, object] = rename
    rules: dict[str, RenameRule] = {}
    for key, value in items.items():
        source = Pattern.of(key, "rename")
        if source.text in rules:
            raise ValueError(f"rename: two rules for {source.text!r}")
        target = None if value is None else Template.of(value, source, "rename")
        rules[source.text] = RenameRule(source=source, target=target)
    return tuple(rules.values())


def _transforms(transform: object) -> tuple[TransformRule, ...]:
    form = "{'target pattern': ('saved pattern', function)}"
    if not isinstance(transform, Mapping):
        raise TypeError(f"transform= takes a mapping {form}, not {transform!r}")
    items: Mapping[object, object] = transform
    rules: list[TransformRule] = []
    for key, value in items.items():
        target = Pattern.of(key, "transform")
        if not isinstance(value, tuple) or len(pair := tuple(value)) != 2 or not callable(pair[1]):
            raise TypeError(f"transform: the rule for {target.text!r} is not of the form {form}")
        names: object = pair[0]
        function: TransformFunction = pair[1]
        single = isinstance(names, str)
        listed: tuple[object, ...] = (
            (names,) if single else tuple(names) if isinstance(names, tuple | list) else ()
        )
        if not listed:
            raise TypeError(
                f"transform: {target.text!r} is made of a saved pattern or a tuple of them, not {names!r}"
            )
        sources = tuple(Pattern.of(name, "transform") for name in listed)
        rules.append(TransformRule(target=target, sources=sources, function=function, single=single))
    return tuple(rules)
