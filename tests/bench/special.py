"""Questions about jaxckpt alone: what the floors are, what one leaf costs, what digests cost, what memory does."""

import gc
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt
from bench import memory, timing, workloads
from bench.timing import Figures, seconds
from bench.undigested import undigested

#: Of how many leaves a call makes: more gain nothing, fewer cost calls.
_GROUP = 200


def floor_of_blocking(directory: Path, *, quick: bool, rounds: int) -> dict[str, Figures]:
    """Seconds that training waits, beside `np.asarray` of each leaf; arrays nobody has looked at before.

    A first save has keys that no save had before, later ones are of one structure.
    """
    tree = workloads.noise(workloads.workloads(quick=quick)["5000x1KiB"].abstract())

    def floor(number: int) -> dict[str, float]:
        leaves = jax.tree.leaves(workloads.fresh(tree))
        return {"seconds": seconds(lambda: [np.asarray(leaf) for leaf in leaves])}

    def save(first: bool, number: int) -> dict[str, float]:
        state = workloads.fresh(tree)
        state = {f"{key}_{number}" if first else key: value for key, value in state.items()}
        path = directory / "blocked"
        gc.collect()
        start = time.perf_counter()
        future = jaxckpt.save_async(path, state)
        blocked = time.perf_counter() - start
        future.result()
        timing.remove(path)
        return {"seconds": blocked}

    contenders = {
        "np.asarray of each leaf": floor,
        "save_async, later saves": partial(save, False),
        "save_async, a first save": partial(save, True),
    }
    return timing.alternate(contenders, rounds=rounds)


def floor_of_making(directory: Path, *, quick: bool, rounds: int) -> dict[str, Figures]:
    """Seconds in which small `jax.Array`s come from host memory, by any call there is, beside a restore.

    Only `from_dlpack` may leave them in the host's memory, where no step can take them as a donation.
    """
    abstract = workloads.workloads(quick=quick)["5000x1KiB"].abstract()
    tree = workloads.noise(abstract)
    hosts = [np.array(leaf) for leaf in jax.tree.leaves(tree)]
    whole = np.stack(hosts)
    sharding = jax.tree.leaves(abstract)[0].sharding
    identity: Callable[..., Any] = jax.jit(lambda *arrays: arrays)
    split: Callable[..., Any] = jax.jit(lambda array: list(array))

    def groups(make: Callable[[int, int], Any]) -> list[Any]:
        return [leaf for at in range(0, len(hosts), _GROUP) for leaf in make(at, at + _GROUP)]

    path = directory / "making"
    jaxckpt.save(path, tree)
    target = workloads.zeros(abstract)
    calls: dict[str, Callable[[], Any]] = {
        "device_put of a list": lambda: jax.device_put(hosts, [sharding] * len(hosts)),
        f"identity jits of {_GROUP}": lambda: groups(lambda start, stop: identity(*hosts[start:stop])),
        f"jits that split {_GROUP}": lambda: groups(lambda start, stop: split(whole[start:stop])),
        "from_dlpack of each": lambda: [jnp.from_dlpack(host) for host in hosts],
        "jaxckpt.restore": lambda: jaxckpt.restore(path, target).tree,
    }

    def timed(call: Callable[[], Any], number: int) -> dict[str, float]:
        return {"seconds": seconds(lambda: jax.block_until_ready(call()))}

    found = timing.alternate({name: partial(timed, call) for name, call in calls.items()}, rounds=rounds)
    timing.remove(path)
    return found


def one_leaf(directory: Path, *, quick: bool, rounds: int) -> dict[str, Figures]:
    """A leaf of 1 KiB out of a checkpoint of 1 GiB: seconds to open it, then to read, and bytes read for it."""
    tree = workloads.noise(workloads.workloads(quick=quick)["100x10MiB"].abstract())
    leaf = np.arange(workloads.KIB // 4, dtype=np.float32)
    path = directory / "one-leaf"
    jaxckpt.save(path, {"large": tree, "small": jnp.asarray(leaf)})
    del tree

    def read(cold: bool, number: int) -> dict[str, float]:
        if cold:
            forget(path)
        start = time.perf_counter()
        reader = jaxckpt.load_checkpoint(path)
        opened = time.perf_counter() - start
        values: list[Any] = []
        taken, nbytes = _reading(lambda: values.append(reader["small"]))
        reader.close()
        if not np.array_equal(values[0], leaf):
            raise ValueError("the leaf is not what was saved")
        return {"open": opened, "read": taken, "nbytes": nbytes}

    found = timing.alternate({"warm": partial(read, False), "cold": partial(read, True)}, rounds=rounds)
    timing.remove(path)
    return found


def digests(directory: Path, *, quick: bool, rounds: int) -> dict[str, Figures]:
    """Seconds of a save, and of restores from a cold and a warm page cache, with and without digests.

    Also the seconds of all cores together, which a busy machine or disk disturbs less; twice the rounds, since
    the differences are small.
    """
    tree = workloads.noise(workloads.workloads(quick=quick)["100x10MiB"].abstract())
    target, size = workloads.zeros(tree), workloads.nbytes(tree)
    path = directory / "digests"

    def once(guard: Callable[[], AbstractContextManager[None]], number: int) -> dict[str, float]:
        told: dict[str, float] = {}

        def measure(name: str, work: Callable[[], Any]) -> Any:
            gc.collect()
            with guard():
                cpu, start = time.process_time(), time.perf_counter()
                result = jax.block_until_ready(work())
                told[name] = time.perf_counter() - start
                told[f"{name}, CPU"] = time.process_time() - cpu
            return result

        measure("save", partial(jaxckpt.save, path, workloads.fresh(tree)))
        forget(path)
        measure("restore, cold", lambda: jaxckpt.restore(path, target).tree)
        result = measure("restore, warm", lambda: jaxckpt.restore(path, target).tree)
        if number == 0 and not workloads.equal(result, tree):
            raise ValueError("jaxckpt did not restore what it saved")
        timing.remove(path)
        return told

    contenders = {"with": partial(once, nullcontext), "without": partial(once, lambda: undigested(size))}
    return timing.alternate(contenders, rounds=2 * rounds)


def limited_memory(directory: Path, *, quick: bool, rounds: int) -> dict[str, Figures]:
    """Bytes above the state at the peak of a save, and of a restore with its result, for several limits."""
    size = workloads.nbytes(workloads.workloads(quick=quick)["100x10MiB"].abstract())
    found: dict[str, Figures] = {}
    for limit in (None, size // 4, size // 16):
        grown = memory.peaks("100x10MiB", "jaxckpt", directory, quick=quick, limit=limit)
        name = "the default" if limit is None else workloads.size(limit)
        limits = {} if limit is None else {"limit": limit}
        figures = {**grown, **limits, "result": size}
        found[name] = {field: [float(value)] for field, value in figures.items()}
    return found


def saves_in_a_row(directory: Path, *, quick: bool, rounds: int) -> dict[str, Figures]:
    """Bytes above the state at the peak of each of ten saves in one process."""
    grown = memory.in_a_row("100x10MiB", "jaxckpt", directory, quick=quick)
    return {"jaxckpt": {"above the state": [float(value) for value in grown]}}


def forget(path: Path) -> None:
    """Drops the files below a path from the page cache; they are durable, hence clean."""
    for file in timing.all_files(path):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _reading(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds that a call takes, and bytes that this process reads for it, from the page cache or not."""
    first = _bytes_read()
    before = _bytes_read()
    start = time.perf_counter()
    work()
    taken = time.perf_counter() - start
    return taken, _bytes_read() - before - (before - first)  # asking costs bytes too


def _bytes_read() -> int:
    """Bytes that this process has read so far, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])
    except OSError:
        return 0


#: Each by its name, with what it is about.
SPECIAL: dict[str, tuple[str, Callable[..., dict[str, Figures]]]] = {
    "floor-of-blocking": ("what blocks, 5000 x 1 KiB", floor_of_blocking),
    "floor-of-making": ("making 5000 jax.Arrays of 1 KiB from host memory", floor_of_making),
    "one-leaf": ("a leaf of 1 KiB out of a checkpoint of 1 GiB", one_leaf),
    "digests": ("what digests cost, 100 x 10 MiB", digests),
    "memory-limit": ("peak memory by memory limit, 100 x 10 MiB", limited_memory),
    "saves-in-a-row": ("peak memory of ten saves in a row, 100 x 10 MiB", saves_in_a_row),
}
