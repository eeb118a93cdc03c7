"""A chart of what was measured, as SVG: a row for each workload, a panel for each figure, a bar for each peer.

Pure. It brings its own background, light or dark as the reader prefers, so that it is legible on any page.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

from bench.report import FIRST, duration
from bench.timing import FIELDS
from bench.workloads import size

#: Those drawn; others in the place of what was not measured.
WORKLOADS = ("5000x1KiB", "100x10MiB", "transformer")
_TITLES = {
    "blocked": "Until the call returns",
    "save": "Until it is durable",
    "restore": "Until it is restored",
}

_WIDTH, _MARGIN, _LABELS, _GAP = 960, 24, 104, 20
_PANEL = (_WIDTH - 2 * _MARGIN - _LABELS - 2 * _GAP) / 3
_TEXT = 92  # behind the longest bar, for its value
_TICK = 50  # what its label takes
_LINE, _BAR = 20, 13
_HEAD, _FOOT = 66, 60

_STYLE = """
  .page { fill: #ffffff; stroke: #d8dee4 }
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #424a53 }
  .title { font-size: 16px; font-weight: 600; fill: #1f2328 }
  .row { font-size: 13px; font-weight: 600; fill: #1f2328 }
  .small { font-size: 11px; fill: #656d76 }
  .own { font-weight: 600; fill: #1f2328 }
  .grid { stroke: #d8dee4; stroke-width: 1 }
  .bar { fill: #a8b1bb } .bar.own { fill: #0969da } .bar.raw { fill: none; stroke: #8c959f; stroke-dasharray: 3 2 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d }
    text { fill: #c9d1d9 }
    .title, .row, text.own { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .grid { stroke: #30363d }
    .bar { fill: #57606a } .bar.own { fill: #4493f8 } .bar.raw { fill: none; stroke: #848d97 }
  }
"""


def draw(measured: Mapping[str, Any]) -> str:
    """The chart of a run, a whole SVG document."""
    there = measured["workloads"]
    names = [name for name in dict.fromkeys((*WORKLOADS, *there)) if name in there][: len(WORKLOADS)]
    parts: list[str] = []
    top = float(_HEAD)
    for name in names:
        parts += _row(there[name], top)
        top += _height(there[name])
    height = top + _FOOT
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" '
        f'height="{height:g}" role="img">',
        "<title>Time to save and to restore, by checkpointer</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1:g}" rx="8"/>',
    ]
    heads = [_text(_left(number), 34, _TITLES[field], "title") for number, field in enumerate(FIELDS)]
    notes = _footnotes(measured)
    foot = [_text(_MARGIN, top + 12 + 15 * number, note, "small") for number, note in enumerate(notes)]
    return "\n".join([*head, *heads, *parts, *foot, "</svg>"]) + "\n"


def _row(told: Mapping[str, Any], top: float) -> Iterator[str]:
    """One workload: its title, the names of the peers, three panels of one scale."""
    yield _text(_MARGIN, top + 6, f"{told['title']}, {size(told['nbytes'])}", "row")
    first = top + 18
    for number, peer in enumerate(told["medians"]):
        yield _text(_MARGIN, first + number * _LINE + _BAR - 2, peer, _class(peer))
    seconds = [value for found in told["medians"].values() for value in found.values()]
    scale = _Scale(min(seconds), max(seconds))
    for number, field in enumerate(FIELDS):
        yield from _panel(told, field, scale, _left(number), first)


def _panel(told: Mapping[str, Any], field: str, scale: "_Scale", left: float, top: float) -> Iterator[str]:
    bottom = top + _LINE * len(told["medians"])
    yield f'<path class="grid" d="M{left:.1f} {bottom:g}h{_PANEL - _TEXT:.1f}"/>'
    for tick, labelled in scale.ticks():
        x = left + scale(tick)
        yield f'<line class="grid" x1="{x:.1f}" y1="{bottom - 4:g}" x2="{x:.1f}" y2="{bottom:g}"/>'
        if labelled:
            label = f"{tick:g} s" if tick >= 1 else duration(tick)
            yield _text(x, bottom + 12, label, "small", "middle")
    for number, (peer, found) in enumerate(told["medians"].items()):
        y, length = top + number * _LINE, max(1.5, scale(found[field]))
        kind = f"bar {_class(peer)}".strip()
        yield f'<rect class="{kind}" x="{left:.1f}" y="{y:g}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
        label = duration(found[field]) + _times(told["ratios"][peer], field, peer)
        yield _text(left + length + 5, y + _BAR - 2, label, _class(peer))


class _Scale:
    """Seconds to pixels, by their logarithm, from half a decade below the least."""

    def __init__(self, least: float, most: float) -> None:
        self._least = math.log10(least) - 0.5
        self._unit = (_PANEL - _TEXT) / (math.log10(most) - self._least)

    def __call__(self, seconds: float) -> float:
        return (math.log10(seconds) - self._least) * self._unit

    def ticks(self) -> list[tuple[float, bool]]:
        """The powers of ten within, and whether there is room for each one's label."""
        most = self._least + (_PANEL - _TEXT) / self._unit
        powers = range(math.floor(most), math.ceil(self._least) - 1, -1)
        every = math.ceil(_TICK / self._unit)
        return [(10.0**power, number % every == 0) for number, power in enumerate(powers)]


def _times(ratios: Mapping[str, float], field: str, peer: str) -> str:
    """How many times as long as jaxckpt."""
    if peer == FIRST or field not in ratios:
        return ""
    times = ratios[field]
    shown = f"{times:.0f}" if times >= 10 else f"{times:.1f}" if times >= 1 else f"{times:.2g}"
    return f" · {shown}×"  # noqa: RUF001


def _footnotes(measured: Mapping[str, Any]) -> list[str]:
    machine = measured["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("jax", "orbax-checkpoint", "safetensors"))
    return [
        f"Medians of {measured['rounds']} rounds; the axes are logarithmic; × is how many times as long as jaxckpt.",  # noqa: RUF001
        "Restored onto the device from a warm page cache; raw is a bare file and fsync, and memory on the host.",
        f"{machine['processor']}, {machine['cores']} cores; device: {machine['device']}; {versions}.",
    ]


def _class(peer: str) -> str:
    return {FIRST: "own", "raw": "raw"}.get(peer, "")


def _left(number: int) -> float:
    return _MARGIN + _LABELS + number * (_PANEL + _GAP)


def _height(told: Mapping[str, Any]) -> float:
    return 18 + _LINE * len(told["medians"]) + 36


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    anchored = f' text-anchor="{anchor}"' if anchor != "start" else ""
    styled = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{styled}{anchored}>{escape(text)}</text>'
