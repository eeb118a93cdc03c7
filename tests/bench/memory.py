"""Memory: each figure in a process of its own, as the growth of its resident memory above what it held before.

The process makes its state (for a save) or only its shapes (for a restore), warms up with a tree of one small
array, gives free memory back to the system, and sets the kernel's high-water mark of resident memory back
(``/proc/self/clear_refs``, Linux). The peak is that mark after the call less the resident memory before it, so
the state is not in it; the result of a restore is. Pages of files that a peer maps count. Elsewhere the mark
cannot be set back, and the growth of `ru_maxrss` is told, which may be too small.

What is run there: `python -m bench.memory JSON`, where the JSON is that of a `Task`.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAVES_IN_A_ROW = 10
_TIMEOUT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a child is to measure.

    Attributes:
        action: save, restore, or saves (`SAVES_IN_A_ROW` of them).
        workload: its name.
        quick: whether its small size is meant.
        peer: who.
        path: of the checkpoint, or where several will be.
        memory_limit: jaxckpt's, in bytes.
    """

    action: str
    workload: str
    quick: bool
    peer: str
    path: str
    memory_limit: int | None = None


def peaks(
    workload: str, peer: str, directory: Path, *, quick: bool, limit: int | None = None
) -> dict[str, int]:
    """Bytes by which memory grows in a save, and in a restore, its result included."""
    with tempfile.TemporaryDirectory(dir=directory) as inside:
        path = str(Path(inside) / "checkpoint")
        tasks = [
            Task(action=action, workload=workload, quick=quick, peer=peer, path=path, memory_limit=limit)
            for action in ("save", "restore")
        ]
        return {task.action: _in_child(task)[0] for task in tasks}


def in_a_row(workload: str, peer: str, directory: Path, *, quick: bool) -> list[int]:
    """Bytes above the state at the peak of each of several saves in one process, a donating step after each."""
    with tempfile.TemporaryDirectory(dir=directory) as inside:
        return _in_child(Task(action="saves", workload=workload, quick=quick, peer=peer, path=inside))


def _in_child(task: Task) -> list[int]:
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(asdict(task))],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(task: Task) -> list[int]:
    """Runs in the child; one peak, or one for each save."""
    import jax
    import jax.numpy as jnp

    from bench import peers, timing, workloads

    peer: Any = peers.Jaxckpt(task.memory_limit) if task.peer == "jaxckpt" else peers.PEERS[task.peer]()
    path = Path(task.path)
    abstract = workloads.workloads(quick=task.quick)[task.workload].abstract()

    def save(where: Path, tree: Any) -> None:
        peer.begin(where, tree)
        peer.wait()

    small = {"small": jax.block_until_ready(jnp.zeros(8))}
    with tempfile.TemporaryDirectory() as inside:
        save(Path(inside) / "checkpoint", small)
        peer.restore(Path(inside) / "checkpoint", small)
    if task.action == "restore":
        return [_growth(lambda: peer.restore(path, abstract))]
    tree = workloads.noise(abstract)
    if task.action == "save":
        return [_growth(lambda: save(path, tree))]
    step: Any = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = jax.block_until_ready(step(tree))  # in place, as long as no save holds what it is given
    gc.collect()
    start, found = _resident(), list[int]()
    for number in range(SAVES_IN_A_ROW):
        _set_back()
        save(path / str(number), tree)
        tree = jax.block_until_ready(step(tree))
        found.append(_peak() - start)
        timing.remove(path / str(number))
    peer.close()
    return found


def _growth(work: Callable[[], Any]) -> int:
    """Bytes by which the peak of a call lies above what was held before it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _set_back()
    start = _resident()
    result = work()
    peak = _peak()
    del result
    return peak - start


def _set_back() -> None:
    """From here on the high-water mark counts anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return _status("VmHWM") or _most()


def _resident() -> int:
    return _status("VmRSS") or _most()


def _most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    """A figure of this process in bytes, 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


if __name__ == "__main__":
    print(json.dumps(_measure(Task(**json.loads(sys.argv[1])))))
