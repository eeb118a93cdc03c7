"""Time: contenders take turns within one process, after a round that does not count."""

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import workloads
from bench.peers import Make, Peer

#: Of a save and the restore after it, in seconds: until the call of save returned; until the checkpoint was
#: durable, that included; into a target on its device, from a warm page cache.
FIELDS = ("blocked", "save", "restore")

Log = Callable[[str], None]
#: What is told of one contender: each figure in each round that counts.
Figures = dict[str, list[float]]


def silent(_: str) -> None:
    """Tells nobody."""


def alternate(
    contenders: Mapping[str, Callable[[int], Mapping[str, float]]], *, rounds: int, log: Log = silent
) -> dict[str, Figures]:
    """The figures of each contender, which is called with the number of the round; round 0 does not count.

    Each round starts with the next contender, so that a drift of the machine meets all.
    """
    found: dict[str, Figures] = {name: {} for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            for field, value in contenders[name](number).items():
                several = found[name].setdefault(field, [])
                several += [value] if number else []
        log(f"  round {number} of {rounds}" if number else "  warmed up and checked")
    return found


def measure(
    makes: Sequence[Make], tree: Any, directory: Path, *, rounds: int, log: Log = silent
) -> dict[str, Figures]:
    """`FIELDS`, files and bytes of a checkpoint, by peer. What the first round restores is compared."""
    target = workloads.zeros(tree)
    peers = [make() for make in makes]
    contenders = {peer.name: partial(_once, peer, directory, tree, target) for peer in peers}
    try:
        return alternate(contenders, rounds=rounds, log=log)
    finally:
        for peer in peers:
            peer.close()


def _once(peer: Peer, directory: Path, tree: Any, target: Any, number: int) -> dict[str, float]:
    """Saves arrays that were never saved before, as in training, waits, restores, and removes the files.

    Raises:
        ValueError: in round 0, if the result differs from what was saved.
    """
    path = directory / f"{number}-{peer.name.replace(' ', '-')}"
    state = workloads.fresh(tree)
    gc.collect()
    start = time.perf_counter()
    peer.begin(path, state)
    blocked = time.perf_counter() - start
    peer.wait()
    saved = time.perf_counter() - start
    del state
    files, nbytes = on_disk(path)
    start = time.perf_counter()
    result = peer.restore(path, target)
    restored = time.perf_counter() - start
    if number == 0 and not peer.same(result, tree):
        raise ValueError(f"{peer.name} did not restore what it saved")
    remove(path)
    return {"blocked": blocked, "save": saved, "restore": restored, "files": files, "nbytes": nbytes}


def on_disk(path: Path) -> tuple[int, int]:
    """Files and bytes of a checkpoint, which may be one file."""
    files = all_files(path)
    return len(files), sum(file.stat().st_size for file in files)


def all_files(path: Path) -> list[Path]:
    """All files below a path, or the one that it is."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def remove(path: Path) -> None:
    """Deletes a checkpoint, a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes; its result lives until the clock has stopped."""
    gc.collect()
    start = time.perf_counter()
    result = work()
    taken = time.perf_counter() - start
    del result
    return taken


def ratio(several: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of how many times the first figure is the second of the same round."""
    return statistics.median(a / b for a, b in zip(several, others, strict=True))
