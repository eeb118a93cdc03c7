"""Opens checkpoints with plain Orbax and compares every value: `python orbax_only.py DIRECTORY`.

Of each case the directory holds a checkpoint, and beside it ``<case>.npz`` with the values that were saved.
The process has Orbax and never imports jaxckpt. It prints one JSON object.
"""

import collections
import functools
import json
import sys
import traceback
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

Pair = collections.namedtuple("Pair", "zebra ant")


class Typed(typing.NamedTuple):
    second: typing.Any
    first: typing.Any


def noise(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def train_state():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="l1")(x)))

    params = Net().init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    optimizer = optax.adam(1e-3)
    _, state = optimizer.update(jax.tree.map(lambda p: p * 0.5 + 1, params), optimizer.init(params), params)
    return {"step": 7, "params": params, "opt_state": state}


def text():
    return {**train_state(), "name": "résumé", "empty": "", "list": ["a", jnp.ones(1)]}


def dtypes():
    wide = noise(1, (6, 4)) * 50
    return {
        "bf16": wide.astype(jnp.bfloat16),
        "f16": wide.astype(jnp.float16),
        "int8": wide.astype(jnp.int8),
        "uint32": jnp.arange(5, dtype=jnp.uint32) + jnp.uint32(2**32 - 5),
        "bool": wide > 0,
        "complex64": (wide + 1j * wide[::-1]).astype(jnp.complex64),
        "float8": wide.astype(jnp.float8_e4m3fn),
        "scalar": jnp.float32(0.1),
        "nan": jnp.array([jnp.nan, -jnp.inf, -0.0], jnp.float32),
    }


def keys():
    return {
        "one": jax.random.key(3),
        "several": jax.random.split(jax.random.key(4), 3),
        "raw": jax.random.PRNGKey(5),
    }


def numpy_arrays():
    return {
        "int64": np.arange(-2, 3) * 2**40,
        "float64": np.linspace(0, 1, 7),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "zero_d": np.array(5, np.int16),
    }


def numpy_scalars():
    return {"float32": np.float32(2.5), "int64": np.int64(2**40), "array": np.arange(3)}


def containers():
    return {
        "list": [jnp.ones(2), None, {}, [jnp.zeros(1), jnp.ones(1)]],
        "tuple": (jnp.arange(3), [], (), jnp.arange(2)),
        "pair": Pair(zebra=jnp.full(3, 1.0), ant=jnp.full(2, 2.0)),
        "typed": Typed(second=jnp.full(1, 3.0), first={"x": jnp.full(1, 4.0)}),
        "empty_state": optax.EmptyState(),
        "empty": {},
        "none": None,
        "ordered": collections.OrderedDict(b=jnp.full(1, 5.0), a=jnp.full(1, 6.0)),
        "values": {"int": 3, "float": 0.1, "bool": True, "negative": -(2**40)},
    }


def shared():
    table = noise(6, (16, 4))
    return {"embed": {"table": table}, "head": {"kernel": table}, "own": table + 1}


def large():
    """24 MB: more than one chunk."""
    return {"w": noise(7, (1500, 4001)), "small": jnp.ones(3)}


def sharded():
    """Over all devices that there are: saved on eight, read on one and on eight."""
    devices = np.array(jax.devices())
    rows = jax.sharding.NamedSharding(jax.make_mesh((len(devices),), ("x",)), jax.P("x"))
    both = jax.P() if len(devices) == 1 else jax.P("a", "b")
    mesh = jax.make_mesh((1, 1) if len(devices) == 1 else (2, len(devices) // 2), ("a", "b"))
    return {
        "rows": jax.device_put(noise(8, (16, 5)), rows),
        "grid": jax.device_put(noise(9, (8, 12)), jax.sharding.NamedSharding(mesh, both)),
        "whole": jax.device_put(noise(10, (3,)), jax.sharding.NamedSharding(mesh, jax.P())),
    }


CASES = {
    "train_state": train_state,
    "text": text,
    "dtypes": dtypes,
    "keys": keys,
    "numpy": numpy_arrays,
    "numpy_scalars": numpy_scalars,
    "containers": containers,
    "shared": shared,
    "large": large,
    "sharded": sharded,
}
WAYS = (
    "StandardCheckpointer with a target",
    "StandardCheckpointer without",
    "PyTreeCheckpointer with a target",
    "PyTreeCheckpointer without",
)
#: Orbax takes no such leaves in a target of these kinds, whoever wrote the checkpoint.
REFUSED = {
    ("text", "StandardCheckpointer with a target"),
    ("numpy_scalars", "StandardCheckpointer with a target"),
    ("numpy_scalars", "PyTreeCheckpointer with a target"),
}
PAIRS = [(case, way) for case in CASES for way in WAYS if (case, way) not in REFUSED]


def by_path(tree):
    """Leaves by their path in plain names, which are the same for a namedtuple and for the dict Orbax makes of it."""
    return {
        "/".join(
            str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step)))) for step in path
        ): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def record(value):
    """A leaf as [type, dtype or value, shape] and its bits."""
    if isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic):
        return [type(value).__name__, repr(value), []], np.zeros(0, np.uint8)
    impl = ""
    if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
        impl, value = str(jax.random.key_impl(value)), jax.random.key_data(value)
    host = np.asarray(value, order="C")
    return [impl or "array", str(host.dtype), list(host.shape)], np.frombuffer(host.tobytes(), np.uint8)


def write_expected(path, tree):
    """The values of a tree, for `check`."""
    records = {key: record(leaf) for key, leaf in by_path(tree).items()}
    about = json.dumps({key: about for key, (about, _) in records.items()})
    np.savez(path, __about__=np.array(about), **{key: bits for key, (_, bits) in records.items()})


def check(path, tree, *, bare_keys):
    """Raises unless the tree has exactly the values that were written, bit for bit.

    `bare_keys`: typed keys may come as the array of their bits.
    """
    with np.load(path) as expected:
        about = json.loads(str(expected["__about__"]))
        got = by_path(tree)
        assert sorted(got) == sorted(about), f"{sorted(got)} is not {sorted(about)}"
        for key, value in got.items():
            if (
                isinstance(value, (int, float)) and about[key][0] == "array"
            ):  # Orbax gives a numpy scalar back so
                value = np.dtype(about[key][1]).type(value)
            what, bits = record(value)
            if what[0] == "array" and bare_keys:
                about[key][0] = "array"
            assert what == about[key], f"{key}: {what} is not {about[key]}"
            assert np.array_equal(bits, expected[key]), f"{key}: other values"


def blank(leaf):
    """A target's leaf: the same but for the value."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            zeros = jnp.zeros(jax.random.key_data(leaf).shape, jnp.uint32)
            return jax.random.wrap_key_data(zeros, impl=jax.random.key_impl(leaf))
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)()


def restored(way, path, target):
    import orbax.checkpoint as ocp

    with_target = way.endswith("with a target")
    if way.startswith("Standard"):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target) if with_target else checkpointer.restore(path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        if with_target:
            arguments = ocp.checkpoint_utils.construct_restore_args(target)
            return checkpointer.restore(path, item=target, restore_args=arguments)
        return checkpointer.restore(path)


@functools.cache
def tree_of(case):
    return CASES[case]()


def outcome(directory, case, way):
    try:
        tree = tree_of(case)
        got = restored(way, directory / case, jax.tree.map(blank, tree))
        if way.endswith("with a target"):
            assert jax.tree.structure(got) == jax.tree.structure(tree), f"{got} is not like {tree}"
            for (path, want), have in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(got), strict=True):
                assert not isinstance(want, jax.Array) or have.sharding == want.sharding, (
                    path,
                    have.sharding,
                )
        # Without a target Orbax gives what is typed `np.ndarray`, which opens on every number of devices.
        check(directory / f"{case}.npz", got, bare_keys=way.endswith("without"))
    except Exception:
        return traceback.format_exc()
    return "ok"


def main(directory):
    results = {f"{case}: {way}": outcome(directory, case, way) for case, way in PAIRS}
    assert "jaxckpt" not in sys.modules
    print(json.dumps({"devices": jax.device_count(), "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
