"""What was measured, for people (tables) and for programs (JSON). Pure but for asking the machine what it is."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from bench import workloads
from bench.bars import Bar
from bench.timing import FIELDS, Figures, ratio

LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "safetensors",
    "numpy",
    "xxhash",
)
FIRST = "jaxckpt"
_MIB = workloads.MIB
#: Figures that are bytes where the others are seconds.
_BYTES = ("nbytes", "limit", "result")


def machine() -> dict[str, Any]:
    """Where this runs, and with which versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **{library: version(library) for library in LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def workload(
    title: str, abstract: Any, peers: Mapping[str, Figures], memory: Mapping[str, Any]
) -> dict[str, Any]:
    """All of one workload.

    Args:
        title: what it is.
        abstract: its tree.
        peers: every figure of every round, by peer.
        memory: bytes above the state at the peak of a save and of a restore, by peer; may be empty.

    Returns:
        Those, the medians in seconds, and the ratios: the median over rounds of how many times as long a peer
        takes as jaxckpt.
    """
    own = peers.get(FIRST)
    return {
        "title": title,
        "leaves": len(jax.tree.leaves(abstract)),
        "nbytes": workloads.nbytes(abstract),
        "peers": peers,
        "memory": memory,
        "medians": {
            name: {field: statistics.median(found[field]) for field in FIELDS}
            for name, found in peers.items()
        },
        "ratios": {
            name: {field: ratio(found[field], own[field]) for field in FIELDS} if own else {}
            for name, found in peers.items()
        },
    }


def workload_table(told: Mapping[str, Any]) -> str:
    """Medians of each peer, and how many times as long as jaxckpt it takes."""
    peaks = ["peak of save", "of restore"] if told["memory"] else []
    rows = [["", *FIELDS, "files", "bytes", *peaks]]
    for name, figures in told["peers"].items():
        medians, ratios, grown = told["medians"][name], told["ratios"][name], told["memory"].get(name, {})
        cells = [
            f"{duration(medians[field])}" + (f" {ratios[field]:6.2f}x" if ratios else "") for field in FIELDS
        ]
        cells += [f"{max(figures['files']):.0f}", workloads.size(max(figures["nbytes"]))]
        cells += [f"{value / _MIB:+.0f} MiB" for value in grown.values()]
        rows.append([name, *cells])
    rounds = len(next(iter(told["peers"].values()))["save"])
    title = f"{told['title']}: {told['leaves']} leaves, {workloads.size(told['nbytes'])}, medians of {rounds} rounds"
    return f"{title}\n{columns(rows)}"


def special_table(told: Mapping[str, Any]) -> str:
    """The median of each figure of each contender; of bytes all different ones, in order."""
    rows: list[list[str]] = []
    for name, figures in told["contenders"].items():
        for field, several in figures.items():
            if field in _BYTES or told["unit"] == "bytes":
                shown = ", ".join(dict.fromkeys(map(workloads.size, several)))
            else:
                shown = duration(statistics.median(several))
            rows.append([name, field, shown])
    return f"{told['title']}\n{columns(rows)}"


def bars_table(bars: Sequence[Bar]) -> str:
    """Each line with what was measured beside it."""
    rows = [["", "against", "bar", "measured", ""]]
    rows += [[bar.what, bar.against, bar.bar, bar.value, "" if bar.met else "missed"] for bar in bars]
    return f"What is asked for, and what was measured\n{columns(rows, right=False)}"


def bars_json(bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [asdict(bar) for bar in bars]


def columns(rows: Sequence[Sequence[str]], *, right: bool = True) -> str:
    """Text in columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width in zip(rest, widths[1:], strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds for people, in three figures."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
