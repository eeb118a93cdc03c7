"""Peers that write one plain file while the caller waits, and fsync it and its directory."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import safetensors.numpy

from bench import workloads


class _OneFile:
    """Saving is over when `begin` returns."""

    def wait(self) -> None:
        pass

    def same(self, result: Any, tree: Any) -> bool:
        return workloads.equal(result, tree)

    def close(self) -> None:
        pass


class Safetensors(_OneFile):
    """`save_file`; `load_file` into numpy, and one `device_put` of all arrays."""

    name = "safetensors"

    def begin(self, path: Path, tree: Any) -> None:
        safetensors.numpy.save_file(_by_name(tree), path)
        _sync(path)

    def restore(self, path: Path, target: Any) -> Any:
        return _on_device(safetensors.numpy.load_file(path), target)


class NumpySavez(_OneFile):
    """`numpy.savez`, not compressed; `numpy.load`, and one `device_put` of all arrays."""

    name = "numpy savez"

    def begin(self, path: Path, tree: Any) -> None:
        with path.open("wb") as file:
            np.savez(file, **_by_name(tree))
        _sync(path)

    def restore(self, path: Path, target: Any) -> Any:
        with np.load(path) as arrays:
            return _on_device(arrays, target)


class FlaxMsgpack(_OneFile):
    """`flax.serialization.to_bytes` and `from_bytes`, and one `device_put` of all arrays."""

    name = "flax msgpack"

    def begin(self, path: Path, tree: Any) -> None:
        path.write_bytes(flax.serialization.to_bytes(tree))
        _sync(path)

    def restore(self, path: Path, target: Any) -> Any:
        tree = flax.serialization.from_bytes(target, path.read_bytes())
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(_put(leaves, target))


class Raw(_OneFile):
    """The least that anybody can do: all bytes into one file, and back into one new buffer on the host."""

    name = "raw"

    def begin(self, path: Path, tree: Any) -> None:
        with path.open("wb", buffering=1 << 20) as file:
            for leaf in jax.tree.leaves(tree):
                file.write(workloads.flat_bytes(leaf))
        _sync(path)

    def restore(self, path: Path, target: Any) -> Any:
        buffer = np.empty(path.stat().st_size, np.uint8)
        view = memoryview(buffer)
        with path.open("rb", buffering=0) as file:
            while view:
                view = view[file.readinto(view) :]
        return buffer

    def same(self, result: Any, tree: Any) -> bool:
        return np.array_equal(
            result, np.concatenate([workloads.flat_bytes(x) for x in jax.tree.leaves(tree)])
        )


def _sync(path: Path) -> None:
    for one in (path, path.parent):
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@lru_cache(maxsize=16)
def _names(structure: Any) -> Sequence[str]:
    """A name for each leaf. Made once for a structure, so that nobody is charged for it."""
    tree = structure.unflatten(range(structure.num_leaves))
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def _by_name(tree: Any) -> dict[str, np.ndarray[Any, Any]]:
    leaves, structure = jax.tree.flatten(tree)
    return {name: np.asarray(leaf) for name, leaf in zip(_names(structure), leaves, strict=True)}


def _on_device(arrays: Any, target: Any) -> Any:
    structure = jax.tree.structure(target)
    return structure.unflatten(_put([arrays[name] for name in _names(structure)], target))


def _put(hosts: Sequence[Any], target: Any) -> list[jax.Array]:
    shardings = [leaf.sharding for leaf in jax.tree.leaves(target)]
    return jax.block_until_ready(jax.device_put(list(hosts), shardings))
