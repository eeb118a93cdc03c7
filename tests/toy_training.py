"""What several tests train: small parameters, an iterator that counts, and comparison bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax


class CountIter:
    """The TensorFlow guide's data, two rows at a time; its position is its state."""

    def __init__(self, start=0):
        self.position = start
        self.asked = 0

    def __iter__(self):
        return self

    def __next__(self):
        x = np.array([[2 * self.position % 10], [(2 * self.position + 1) % 10]], np.float32)
        self.position += 1
        return x, x * 5 + np.arange(5, dtype=np.float32)

    def get_state(self):
        self.asked += 1
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def params(value=1.0):
    """Two layers of other shapes; the values differ from place to place."""
    shapes = {"l1": {"kernel": (2, 3), "bias": (3,)}, "l2": {"kernel": (3, 2), "bias": (2,)}}
    sizes = iter(range(4))
    return jax.tree.map(
        lambda shape: jnp.linspace(value, value + next(sizes), int(np.prod(shape))).reshape(shape),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def grads(tree, seed):
    """Gradients that differ for each place and seed."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([jnp.sin(leaf * (seed + 1) + place) for place, leaf in enumerate(leaves)])


def trained(optimizer, net=None, steps=3):
    """Parameters and optimizer state after some steps, so that no moment is zero."""
    net = params() if net is None else net
    state = optimizer.init(net)
    for seed in range(steps):
        updates, state = optimizer.update(grads(net, seed), state, net)
        net = optax.apply_updates(net, updates)
    return {"net": net, "optimizer": state}


def fresh(optimizer, net=None):
    """The same before the first step, with other parameters."""
    net = params(-7.0) if net is None else net
    return {"net": net, "optimizer": optimizer.init(net)}


def states(tree, cls):
    """Every optax state of a class in a tree: found without any help of jaxckpt's."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, cls))
    return [node for node in found if isinstance(node, cls)]


def by_path(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def same_bits(a, b):
    """Whether two values are the same array, NaN and the sign of zero included."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same(a, b):
    """Two trees are equal: structure, types, dtypes, bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y), (jax.tree_util.keystr(path), type(x), type(y))
        if hasattr(x, "dtype"):
            assert same_bits(x, y), jax.tree_util.keystr(path)
        else:
            assert x == y, jax.tree_util.keystr(path)


def zeros(tree):
    """The tree with other values: what a restore has to replace."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
