"""States to save: each a function without arguments besides its size, the same on every call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def small_leaves(count: int, nbytes: int = 1024) -> dict[str, Any]:
    """A flat dict of `count` float32 arrays of `nbytes` bytes each, as noise, on the default device."""
    rng = np.random.default_rng(0)
    tree = {f"leaf_{i:05d}": jnp.asarray(rng.standard_normal(nbytes // 4, np.float32)) for i in range(count)}
    return jax.block_until_ready(tree)


def zeros_like(tree: Any) -> Any:
    """A target: the same shapes on the same devices, with other values."""
    return jax.block_until_ready(jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), x.sharding), tree))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def equal(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are bit for bit the same."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))
