"""States to save: trees of abstract arrays, and values for them.

Values are noise from a fixed seed, as little compressible as trained weights are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Workload:
    """A state by name.

    Attributes:
        name: what `--only` calls it.
        title: what it is.
        abstract: its tree, each leaf a `jax.ShapeDtypeStruct` on the default device.
    """

    name: str
    title: str
    abstract: Callable[[], Any]


class Block(nn.Module):
    """A layer of a transformer, normalized before each part."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=nn.make_causal_mask(x[..., 0]))
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class Transformer(nn.Module):
    """A language model as GPT-2's, its embedding shared with its output."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width)
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = embed(tokens) + position[: tokens.shape[-1]]
        for number in range(self.layers):
            x = Block(self.heads, name=f"block_{number}")(x)
        return embed.attend(nn.LayerNorm()(x))


def transformer(vocabulary: int, width: int, layers: int, heads: int, length: int = 512) -> Any:
    """Parameters and adam's state of a `Transformer`, float32: every parameter three times."""
    model = Transformer(vocabulary, width, layers, heads, length)

    def init() -> Any:
        params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
        return {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": jnp.int32(0)}

    return _placed(jax.eval_shape(init))


def uniform(count: int, nbytes: int) -> Any:
    """A flat dict of `count` float32 vectors of `nbytes` bytes each."""
    leaf = jax.ShapeDtypeStruct((nbytes // 4,), jnp.float32)
    return _placed({f"leaf_{number:05d}": leaf for number in range(count)})


def _uniform(name: str, count: int, nbytes: int) -> Workload:
    title = f"{count} x {size(nbytes)}" if count > 1 else f"one array of {size(nbytes)}"
    return Workload(name, title, lambda: uniform(count, nbytes))


def workloads(*, quick: bool) -> dict[str, Workload]:
    """All workloads by name; the quick ones are of the same shapes, and small."""
    width = (256, 64, 1, 2) if quick else (20_000, 768, 12, 12)
    title = "a flax transformer with adam"
    found = [
        _uniform("5000x1KiB", 200 if quick else 5000, KIB),
        _uniform("1000x256B", 20 if quick else 1000, 256),
        _uniform("960x256KiB", 10 if quick else 960, 256 * KIB),
        _uniform("100x10MiB", 4 if quick else 100, MIB if quick else 10 * MIB),
        _uniform("1x1GiB", 1, 8 * MIB if quick else GIB),
        Workload("transformer", title, lambda: transformer(*width)),
    ]
    return {workload.name: workload for workload in found}


def _placed(tree: Any) -> Any:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def noise(abstract: Any) -> Any:
    """Values for a tree, the same on every call: normally distributed, integers counting up."""
    rng = np.random.default_rng(0)

    def leaf(spec: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(spec.dtype, jnp.integer):
            value = np.arange(spec.size, dtype=spec.dtype).reshape(spec.shape)
        else:
            value = rng.standard_normal(spec.shape, np.float32).astype(spec.dtype, copy=False)
        # a copy: what `device_put` makes may lie in numpy's memory, as no result of a training step does
        return jnp.array(jax.device_put(value, spec.sharding), copy=True)

    return jax.block_until_ready(jax.tree.map(leaf, abstract))


def fresh(tree: Any) -> Any:
    """The same values in arrays that nobody has looked at yet: JAX keeps what `np.asarray` once gave."""
    return jax.block_until_ready(jax.tree.map(lambda x: jnp.array(x, copy=True), tree))


def zeros(abstract: Any) -> Any:
    """A target with other values."""
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
    return jax.block_until_ready(made)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def equal(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are of one structure and bit for bit the same."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and _same(x, y) for x, y in pairs)


def _same(x: Any, y: Any) -> bool:
    return np.array_equal(flat_bytes(x), flat_bytes(y))


def flat_bytes(array: Any) -> np.ndarray[Any, Any]:
    """The bytes of an array, shown in place where that can be."""
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def size(nbytes: float) -> str:
    """Bytes for people, in three figures."""
    units = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
    unit, name = next((one for one in units if nbytes >= one[0]), units[-1])
    number = nbytes / unit
    return f"{number:.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
