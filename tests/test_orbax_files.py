"""Plain Orbax opens what we lay down, on any number of devices."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from graphs import make

from jaxckpt.graph.model import ArraySpec, ValueSpec
from jaxckpt.storage.format import orbax_files
from jaxckpt.storage.format.spelling import places
from jaxckpt.storage.layout import layout, orbax_values
from jaxckpt.storage.manifest import Files, Manifest, encode

# Writes a checkpoint of `tree` with what this package says, and tensorstore's plain key-value interface.
WRITE = """
import collections, dataclasses, json, os, sys
from typing import NamedTuple
import jax, jax.numpy as jnp, numpy as np, ml_dtypes, optax, flax
import tensorstore as ts
from jaxckpt.graph.flatten import flatten
from jaxckpt.storage.format import orbax_files
from jaxckpt.storage.chunks import chunk_names, chunk_slices, digest
from jaxckpt.storage.format.dtypes import mask_sub_byte
from jaxckpt.storage.layout import layout, orbax_values, prefix
from jaxckpt.storage.manifest import Files, Manifest, encode
from jaxckpt.storage.format.spelling import places

class NT(NamedTuple):
    a: object
    b: object

@jax.tree_util.register_pytree_node_class
class Keyless:
    def __init__(self, x, y): self.x, self.y = x, y
    def tree_flatten(self): return (self.x, self.y), None
    @classmethod
    def tree_unflatten(cls, _, children): return cls(*children)

@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DC:
    p: object
    q: object

class Model(flax.struct.PyTreeNode):
    params: dict
    apply: object = flax.struct.field(pytree_node=False, default=None)

def write(path, tree):
    flat = flatten(tree)
    shown = places(flat.graph)
    entries = layout(flat.graph, shown)
    base = ts.KvStore.open({"driver": "ocdbt", "base": "file://" + path + "/"}).result()
    def put(key, host, chunk_shape):
        document = ts.open({"driver": "zarr", "kvstore": "memory://"}, dtype=ts.dtype(host.dtype), shape=host.shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=chunk_shape), create=True).result().kvstore.read(".zarray").result().value
        document = {**json.loads(document), "compressor": None}
        base.write(prefix(key) + ".zarray", json.dumps(document)).result()
        for name, place in zip(chunk_names(host.shape, chunk_shape), chunk_slices(host.shape, chunk_shape)):
            base.write(prefix(key) + name, mask_sub_byte(host[place]).tobytes()).result()
    for entry in entries:
        value = flat.values[entry.owner[0]]
        if entry.raw:
            continue
        if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        for key in (entry.key, *entry.alias_keys):
            put(key, np.asarray(value), entry.chunk_shape)
    values = orbax_values(flat.graph, shown)
    for key, array in values.arrays:
        put(key, array, ())
    for name, data in {**orbax_files.files(flat.graph, entries, shown), **orbax_files.value_files(values)}.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        open(os.path.join(path, name), "wb").write(data)
    manifest = encode(Manifest(graph=flat.graph, entries=entries, digests=(b"x" * 16,) * len(entries),
        files=Files(sequence=1, started=1.0, committed=2.0)))
    open(os.path.join(path, "graph.json"), "wb").write(manifest)
    open(os.path.join(path, orbax_files.CHECKPOINT_METADATA), "wb").write(orbax_files.checkpoint_metadata(manifest))
    open(os.path.join(path, orbax_files.COMMIT_SUCCESS), "wb").write(orbax_files.COMMIT_SUCCESS_CONTENT)
    return flat

def same(a, b):
    if jax.dtypes.issubdtype(getattr(a, "dtype", None), jax.dtypes.prng_key):
        assert b.dtype == a.dtype, (a, b)
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), (a, b)
"""

ARRAYS = """
tree = {
    "w": jnp.arange(6.0).reshape(2, 3), "bf": jnp.ones((4,), jnp.bfloat16), "i4": jnp.arange(-8, 8, dtype=jnp.int4),
    "z": jnp.zeros((0, 3)), "s": jnp.float32(2.5), "f8": jnp.ones(3, jnp.float8_e4m3fn), "b": jnp.array([True, False]),
    "c": jnp.ones(2, jnp.complex64), "np": np.arange(3), "np64": np.float64(1.5), "l": [jnp.ones(1), (jnp.zeros(2),)],
    "nt": NT(jnp.ones(2), {"deep.er": jnp.zeros(1)}), "k": Keyless(jnp.ones(1), jnp.zeros(2)), "dc": DC(jnp.ones(2), [np.ones(1)]),
    "net": {"x": jnp.ones(3)}, "opt": optax.adam(1e-3).init({"x": jnp.ones(3)}), "m": Model({"kernel": jnp.ones((2, 2))}), "n": None, "e": {}, "el": [], "et": (),
    "key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3), 7: {"x": jnp.ones(1)},
    "sl/ash": jnp.ones(2), "": jnp.ones(3), "i": 3, "f": 0.5, "t": True,
    "fd": flax.core.FrozenDict({"u": jnp.ones(1)}), "od": collections.OrderedDict([("b", jnp.ones(1)), ("a", jnp.ones(2))]),
}
tree = {str(k): v for k, v in tree.items()}
"""


def run(code, *arguments, devices=1):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "ckpt"
    path.mkdir()
    run(WRITE + ARRAYS + "write(sys.argv[1], tree)", path)
    return path


def test_orbax_restores_the_callers_own_tree(checkpoint):
    # Sharded on two devices, with the very pytree as target: keys come back as keys, empty containers as such.
    code = """
    import orbax.checkpoint as ocp
    mesh = jax.sharding.Mesh(jax.devices(), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(lambda x: jax.device_put(x, replicated) if isinstance(x, jax.Array) else x, tree)
    got = ocp.StandardCheckpointer().restore(sys.argv[1], target)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    jax.tree.map(same, tree, got)
    assert got["w"].sharding == replicated
    got = ocp.PyTreeCheckpointer().restore(sys.argv[1], item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    jax.tree.map(same, tree, got)
    print("done")
    """
    assert "done" in run(WRITE + ARRAYS + textwrap.dedent(code), checkpoint, devices=2)


def test_orbax_restores_without_a_target(checkpoint):
    # On a program that knows nothing of the tree: numpy, 64 bits kept, keys as their bits.
    code = """
    import sys, numpy as np, orbax.checkpoint as ocp
    for checkpointer in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
        got = checkpointer.restore(sys.argv[1])
        assert type(got["np"]) is np.ndarray and got["np"].dtype == np.int64, got["np"]
        assert got["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert got["i4"].astype(int).tolist() == list(range(-8, 8))
        assert (got["i"], got["f"], got["t"], got["n"], got["e"], got["el"]) == (3, 0.5, True, None, {}, [])
        assert got["l"][1][0].tolist() == [0, 0] and got["nt"]["b"]["deep.er"].shape == (1,)
        assert got["opt"][0]["mu"]["x"].shape == (3,) and got["7"]["x"].shape == (1,)
        assert got["key"].dtype == np.uint32 and got["keys"].shape == (3, 4)
        assert got["k"][1].shape == (2,) and got["z"].shape == (0, 3) and got[""].shape == (3,)
    metadata = ocp.StandardCheckpointer().metadata(sys.argv[1])
    print(metadata.item_metadata["w"].shape if hasattr(metadata, "item_metadata") else metadata["w"].shape)
    """
    assert "(2, 3)" in run(code, checkpoint, devices=3)


def test_what_orbax_cannot_hold_does_not_keep_it_from_the_rest(tmp_path):
    code = """
    import orbax.checkpoint as ocp
    tree = {"w": jnp.ones(2), "u4": jnp.ones(3, jnp.uint4), "names": np.array(["a", "bc"]), "huge": 1 << 80, "act": jnp.tanh,
            "list": [jnp.tanh, np.array(["x"]), jnp.ones(2)], "text": "hé", "raw": b"bytes", "z": 1j, "a.b": jnp.ones(1),
            "a": {"b": jnp.zeros(3)}, "be": np.arange(2.0).astype(">f4"), "big": 1 << 63, "neg": -5, "sub": {"f": jnp.tanh}}
    write(sys.argv[1], tree)
    got = ocp.PyTreeCheckpointer().restore(sys.argv[1])
    assert got["list"][:2] == [None, None] and got["list"][2].tolist() == [1, 1]
    assert (got["text"], got["big"], got["neg"], got["z"]) == ("hé", 1 << 63, -5, 1j)
    assert got["a"]["b"].tolist() == [0, 0, 0] and got["w"].tolist() == [1, 1]
    assert not {"u4", "names", "huge", "act", "raw", "be", "a.b", "sub"} & got.keys(), got.keys()
    print("done")
    """
    assert "done" in run(WRITE + textwrap.dedent(code), tmp_path)


def test_a_tree_of_one_array_opens(tmp_path):
    code = """
    import orbax.checkpoint as ocp
    write(sys.argv[1], jnp.arange(3.0))
    print(ocp.PyTreeCheckpointer().restore(sys.argv[1]).tolist())
    """
    assert "[0.0, 1.0, 2.0]" in run(WRITE + textwrap.dedent(code), tmp_path)


# The files themselves

GRAPH = make({"w": ArraySpec(shape=(2,), dtype="float32"), "t": ValueSpec(type="str", value="x"), "n": None})


def test_the_files_are_what_orbax_writes():
    shown = places(GRAPH)
    files = orbax_files.files(GRAPH, layout(GRAPH), shown)
    files |= orbax_files.value_files(orbax_values(GRAPH, shown))
    assert sorted(files) == ["_METADATA", "_strings.json"]
    assert json.loads(files["_strings.json"]) == {"t": "x"}
    tree = json.loads(files["_METADATA"])["tree_metadata"]
    assert tree["('w',)"] == {
        "key_metadata": [{"key": "w", "key_type": 2}],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
    assert tree["('n',)"]["value_metadata"] == {"value_type": "None", "skip_deserialize": True}


def test_checkpoint_metadata_is_a_function_of_the_manifests_bytes():
    entries = layout(GRAPH)
    one, other = (
        encode(
            Manifest(
                graph=GRAPH,
                entries=entries,
                digests=(b"x" * 16,),
                files=Files(sequence=n, started=1.5, committed=2.5),
            )
        )
        for n in (1, 2)
    )
    assert orbax_files.checkpoint_metadata(one) == orbax_files.checkpoint_metadata(one)
    assert orbax_files.checkpoint_metadata(one) != orbax_files.checkpoint_metadata(other)
    document = json.loads(orbax_files.checkpoint_metadata(one))
    assert document["init_timestamp_nsecs"] == 1_500_000_000
    assert np.iinfo(np.int64).max > document["commit_timestamp_nsecs"]


def test_a_checkpoint_of_ours_without_its_manifest_is_known():
    data = orbax_files.checkpoint_metadata(
        encode(Manifest(graph=make({}), files=Files(sequence=1, started=1.0, committed=2.0)))
    )
    foreign = b'{"item_handlers": "x", "metrics": {}, "custom_metadata": {}}'
    assert orbax_files.is_ours(["_METADATA", "_CHECKPOINT_METADATA"], data)
    assert orbax_files.is_ours(["chunks.process_0"], None)
    assert not orbax_files.is_ours(["_METADATA", "_CHECKPOINT_METADATA", "d"], foreign)
    assert not orbax_files.is_ours(["_METADATA"], None)
