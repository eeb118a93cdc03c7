"""Measuring: peers take turns within one process, after a round that does not count."""

import gc
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from bench import workloads
from bench.peers import Peer

LIBRARIES = ("jax", "orbax-checkpoint", "tensorstore", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one save and the restore after it.

    Attributes:
        blocked: until the call of save returned.
        save: until the checkpoint was durable, `blocked` included.
        restore: into a target on the device, from a warm page cache.
    """

    blocked: float
    save: float
    restore: float


FIELDS = ("blocked", "save", "restore")


def once(peer: Peer, path: Path, tree: Any, target: Any, *, check: bool) -> Times:
    """Saves, waits, restores, and removes what was written.

    Raises:
        ValueError: `check`, and the result differs from what was saved.
    """
    gc.collect()
    start = time.perf_counter()
    peer.begin(path, tree)
    blocked = time.perf_counter() - start
    peer.wait()
    saved = time.perf_counter() - start
    start = time.perf_counter()
    result = peer.restore(path, target)
    restored = time.perf_counter() - start
    if check and not workloads.equal(result, tree):
        raise ValueError(f"{peer.name} did not restore what it saved")
    shutil.rmtree(path)
    return Times(blocked=blocked, save=saved, restore=restored)


def measure(
    peers: Sequence[Callable[[], Peer]], tree: Any, directory: Path, *, rounds: int
) -> dict[str, list[Times]]:
    """Times of each peer by name: one round to warm up, which is checked, then `rounds` that count.

    Peers alternate, and each round starts with the next one, so that a drift of the machine meets all.
    """
    target = workloads.zeros_like(tree)
    made = [make() for make in peers]
    times: dict[str, list[Times]] = {peer.name: [] for peer in made}
    try:
        for number in range(rounds + 1):
            shift = number % len(made)
            for peer in made[shift:] + made[:shift]:
                path = directory / f"{number}-{peer.name.replace(' ', '-')}"
                result = once(peer, path, tree, target, check=number == 0)
                if number:
                    times[peer.name].append(result)
    finally:
        for peer in made:
            peer.close()
    return times


def medians(times: list[Times]) -> dict[str, float]:
    """The median of each figure, in seconds."""
    return {field: statistics.median(getattr(one, field) for one in times) for field in FIELDS}


def table(times: dict[str, list[Times]]) -> str:
    """Medians of each peer, and how many times as long as the first one it takes."""
    first = medians(next(iter(times.values())))
    width = max(map(len, times))
    lines = [" " * width + "".join(f"{field:>20}" for field in FIELDS)]
    for name, several in times.items():
        own = medians(several)
        cells = [f"{own[field] * 1000:9.1f} ms {own[field] / first[field]:6.2f}x" for field in FIELDS]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def report(name: str, tree: Any, times: dict[str, list[Times]]) -> dict[str, Any]:
    """All that was measured and where, as JSON."""
    first = medians(next(iter(times.values())))
    return {
        "workload": name,
        "leaves": len(jax.tree.leaves(tree)),
        "nbytes": workloads.nbytes(tree),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.system(),
            "device": jax.devices()[0].device_kind,
            **{library: version(library) for library in LIBRARIES},
        },
        "seconds": {peer: [asdict(one) for one in several] for peer, several in times.items()},
        "medians": {peer: medians(several) for peer, several in times.items()},
        "ratios": {
            peer: {field: value / first[field] for field, value in medians(several).items()}
            for peer, several in times.items()
        },
    }


def write_json(path: Path, measured: dict[str, Any]) -> None:
    """Writes a `report`."""
    path.write_text(json.dumps(measured, indent=1) + "\n")
