"""Manifests that differ in digests and dates only: the graph of one is that of the next. Pure, but remembers.

A training run writes the same graph again and again, and an evaluation beside it reads them all. What is
remembered was checked when it was read first, and is used only where the text is the same, byte for byte.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxckpt.storage.format.seal import parts

if TYPE_CHECKING:
    from jaxckpt.graph.model import ObjectGraph
    from jaxckpt.storage.layout import Entry

# In a JSON text quotes stand only around strings, so that this is always a field of that name.
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{32})"')
# Graphs take about eight times their text: this much is that of some 40,000 leaves.
_MOST_BYTES = 8 << 20


class Text(NamedTuple):
    """The text of a manifest.

    Attributes:
        saved: the deterministic part without the values of its fields named "digest".
        digests: those values.
        files: the other part, a JSON object.
    """

    saved: bytes
    digests: tuple[bytes, ...]
    files: bytes


class Known(NamedTuple):
    """What the deterministic part says, but for the digests; checked."""

    graph: ObjectGraph
    metadata: Any
    entries: tuple[Entry, ...]


_known: OrderedDict[bytes, Known] = OrderedDict()


def take_apart(data: bytes) -> Text | None:
    """The text of a sealed manifest; None if it is not laid out as ours are."""
    found = parts(data)
    if found is None:
        return None
    pieces = _DIGEST.split(found[0])
    return Text(
        b"\0".join(pieces[::2]), tuple([bytes.fromhex(text.decode()) for text in pieces[1::2]]), found[1]
    )


def recall(text: Text) -> Known | None:
    """What was remembered of an equal text."""
    known = _known.get(text.saved)
    if known is not None:
        with contextlib.suppress(KeyError):  # no lock: another thread may have dropped it
            _known.move_to_end(text.saved)
    return known


def remember(text: Text, known: Known, digests: tuple[bytes, ...]) -> None:
    """Remembers what a text said.

    Args:
        text: whose part `files` was read on its own.
        known: what the whole said.
        digests: of its entries. Where other fields have such values too, it is not remembered.
    """
    if text.digests != digests:
        return
    _known[text.saved] = known
    with contextlib.suppress(KeyError):
        while sum(map(len, list(_known))) > _MOST_BYTES:
            _known.popitem(last=False)
