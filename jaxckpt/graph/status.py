"""What a restore did with each leaf: `RestoreStatus`.

Two laws hold, each name of a shared array counting once:

* ``restored``, ``missing``, ``fresh`` and ``ambiguous`` are exactly the target's leaves that have values.
* The saved keys in ``restored``, ``unused``, and what ``ambiguous`` names of the saved keys are exactly
  the saved leaves that have values, as far as they lie below ``at``. (A saved leaf that some ambiguous
  leaf could be, and that has another name, is in ``unused``; ``candidates`` says of which.)

A second name of a restored array stays in ``unused``, since nothing asked for that name; it does not
fail `RestoreStatus.assert_consumed`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxckpt.errors import RestoreAssertionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: How many keys an error names.
LISTED = 10


def listed(keys: Iterable[str]) -> str:
    """Up to ten keys, one a line, and how many more."""
    found = list(keys)
    lines = [f"\n  {key}" for key in found[:LISTED]]
    more = f"\n  and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return "".join(lines) + more


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RestoreStatus:
    """What a restore did with each leaf; see the laws of this module.

    Attributes:
        restored: for each restored target key the saved keys that its value came from: one, but for a
            gathering transform, or several counts that are equal.
        missing: target keys that the checkpoint does not have; the target's own value was kept.
        fresh: target keys that kept the target's value because it was asked for.
        cast: those of ``restored`` that were converted to another width.
        unused: saved keys that nothing asked for.
        slots_unused: those of ``unused`` that are slots.
        ambiguous: target keys that could be any of several saved ones; the target's own value was kept.
        candidates: for each of ``ambiguous`` those saved keys.
        replaced: for each restored Python value that differed from the target's: both, the target's first.
        excused: those of ``unused`` that do not fail `assert_consumed`.
        checkpoint: False if there was no checkpoint at all (``restore(None, target)``).
    """

    restored: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    missing: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    slots_unused: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    replaced: Mapping[str, tuple[object, object]] = field(default_factory=dict[str, tuple[object, object]])
    excused: frozenset[str] = frozenset()
    checkpoint: bool = True

    def __post_init__(self) -> None:
        # A copy behind a proxy: a status that was handed out never changes.
        for name in ("restored", "candidates", "replaced"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __hash__(self) -> int:
        return hash((tuple(self.restored.items()), self.missing, self.fresh, self.unused, self.ambiguous))

    def __reduce__(self) -> tuple[object, tuple[object]]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _revive, ({k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in values.items()},)

    @classmethod
    def nothing(cls, keys: Iterable[str]) -> RestoreStatus:
        """The status of a restore from no checkpoint: each of the target's ``keys`` is missing."""
        return cls(missing=tuple(keys), checkpoint=False)

    def assert_consumed(self) -> RestoreStatus:
        """Every saved value was restored.

        A second name of an array that was restored passes, with ``skip_slots=True`` the slots do, and a
        ``save_counter`` always does.

        Raises:
            RestoreAssertionError: some were not; it names up to ten.
        """
        self._assert_checkpoint()
        left = [key for key in self.unused if key not in self.excused]
        if left or self.ambiguous:
            unsure = f"\nAmbiguous in the target:{listed(self.ambiguous)}" if self.ambiguous else ""
            raise RestoreAssertionError(
                f"{len(left)} saved values were not restored, because the target does not have them "
                f"(rename= if they have other names there):{listed(left)}{unsure}"
            )
        return self

    def assert_existing_objects_matched(self) -> RestoreStatus:
        """Every leaf of the target has its value from the checkpoint, or was asked to be fresh.

        Raises:
            RestoreAssertionError: some were not found; it names up to ten.
        """
        self._assert_checkpoint()
        left = [*self.missing, *self.ambiguous]
        if left:
            raise RestoreAssertionError(
                f"{len(left)} values of the target were not restored, because the checkpoint lacks them "
                f"(rename= if they have other names there):{listed(left)}"
            )
        return self

    def assert_nontrivial_match(self) -> RestoreStatus:
        """At least one leaf was restored.

        Raises:
            RestoreAssertionError: none was.
        """
        self._assert_checkpoint()
        if not self.restored:
            raise RestoreAssertionError(
                f"nothing in the target matches the checkpoint. Saved:{listed(self.unused)}\n"
                f"Wanted:{listed([*self.missing, *self.fresh, *self.ambiguous])}"
            )
        return self

    def expect_partial(self) -> RestoreStatus:
        """The same status: nothing is printed when a program ends, so there is nothing to silence."""
        return self

    def _assert_checkpoint(self) -> None:
        if not self.checkpoint:
            raise RestoreAssertionError(
                "No checkpoint specified (restore(None, target)): nothing was restored"
            )

    def counts(self) -> dict[str, int]:
        """How many keys are in each set that is not empty."""
        names = ("restored", "missing", "fresh", "cast", "ambiguous", "unused", "slots_unused")
        return {name: len(getattr(self, name)) for name in names if getattr(self, name)}

    def rows(self) -> list[tuple[str, str, str]]:
        """What is worth a look, as (set, key, remark); of ``restored`` only what is not plain."""
        rows = [("missing", key, "not in the checkpoint") for key in self.missing]
        rows += [("fresh", key, "kept the target's value, as asked") for key in self.fresh]
        rows += [("cast", key, "") for key in self.cast]
        for key in self.ambiguous:
            rows.append(("ambiguous", key, "could be " + " or ".join(self.candidates.get(key, ()))))
        rows += [("replaced", key, f"{old!r} -> {new!r}") for key, (old, new) in self.replaced.items()]
        for key, sources in self.restored.items():
            if sources != (key,):
                shown = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
                rows.append(("restored", key, f"from {shown}"))
        slots = set(self.slots_unused)
        rows += [("unused", key, "slot" if key in slots else "") for key in self.unused]
        return rows

    def _head(self) -> str:
        if not self.checkpoint:
            return "no checkpoint, nothing restored"
        return ", ".join(f"{count} {name}" for name, count in self.counts().items()) or "nothing asked for"

    def __repr__(self) -> str:
        return f"<RestoreStatus: {self._head()}>"

    def __str__(self) -> str:
        lines: list[str] = [f"Restore: {self._head()}"]
        shown = _shorten(self.rows())
        width = max((len(name) for name, _, _ in shown), default=0)
        long = min(max((len(key) for _, key, _ in shown), default=0), 60)
        lines += [f"  {name:<{width}}  {key:<{long}}  {remark}".rstrip() for name, key, remark in shown]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for row in _shorten(self.rows())
        )
        return f"<div><b>Restore</b>: {html.escape(self._head())}<table>{cells}</table></div>"


def _revive(values: dict[str, object]) -> RestoreStatus:
    return RestoreStatus(**values)  # pyright: ignore[reportArgumentType]


def _shorten(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Up to ten rows of each set."""
    shown: list[tuple[str, str, str]] = []
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[0]] = counts.get(row[0], 0) + 1
        if counts[row[0]] <= LISTED:
            shown.append(row)
    more = [(name, f"... and {count - LISTED} more", "") for name, count in counts.items() if count > LISTED]
    return shown + more
