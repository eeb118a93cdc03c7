"""How a restore reads: into the results, within the memory limit, telling how far it is."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt
from jaxckpt.storage import blank, devices
from jaxckpt.storage.slab import Slab

MIB = 1 << 20


@pytest.fixture
def in_place(monkeypatch):
    monkeypatch.setattr(blank, "_LEAST", 1)
    monkeypatch.setattr(blank, "_LEAST_BYTES", 1)


def saved(tmp_path, tree):
    path = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    jaxckpt.save(path, tree)
    return path


def mixed():
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((8,), ("d",))
    split = jax.device_put(rng.standard_normal((16, 3), np.float32), NamedSharding(mesh, P("d")))
    return {
        "many": [jnp.asarray(rng.standard_normal((4, 2), np.float32)) for _ in range(70)],
        "large": jnp.asarray(rng.standard_normal((700, 1000), np.float32)),
        "numpy": rng.standard_normal(100),
        "big numpy": rng.standard_normal((300, 1000)),
        "scalar": np.float32(3),
        "key": jax.random.key(5),
        "ref": jax.new_ref(jnp.arange(3.0)),
        "int4": jnp.arange(5, dtype=jnp.int4),
        "empty": jnp.zeros((0, 2)),
        "split": split,
        "number": 7,
        "text": "x" * 100_000,
    }


def equal(a, b):
    if isinstance(a, str | int):
        return a == b
    if isinstance(a, jax.Ref):
        a, b = a[...], b[...]
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return type(a) is type(b) and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("limit", [None, 1, 10_000])
def test_every_way_of_reading_gives_the_same(tmp_path, in_place, limit):
    tree = mixed()
    path = saved(tmp_path, tree)
    blank_target = {**tree, "large": jnp.zeros((700, 1000)), "numpy": np.zeros(100), "number": 0, "text": ""}
    told = []
    result, status = jaxckpt.restore(
        path, blank_target, memory_limit=limit, progress=lambda *args: told.append(args)
    )
    assert all(jax.tree.leaves(jax.tree.map(equal, result, tree)))
    assert not status.unused
    total = told[-1][1]
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    hosts = [devices.hold(leaf) for leaf in jax.tree.leaves(tree) if not isinstance(leaf, int | str)]
    assert total == sum(host.nbytes for host in hosts) + 100_000


def test_large_arrays_are_copied_nowhere(tmp_path, in_place, monkeypatch):
    tree = {f"w{i}": jnp.full((256, 1024), i, jnp.float32) for i in range(6)}
    path = saved(tmp_path, tree)

    def refuse(*_):
        raise AssertionError("host memory beside the result")

    monkeypatch.setattr(Slab, "cut", refuse)
    monkeypatch.setattr(jax, "device_put", refuse)
    result, _ = jaxckpt.restore(path, {key: jax.ShapeDtypeStruct((256, 1024), "float32") for key in tree})
    monkeypatch.undo()
    addresses = [array.unsafe_buffer_pointer() for array in result.values()]
    later = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(result)
    assert {array.unsafe_buffer_pointer() for array in later.values()} == set(addresses)
    assert all(array.is_deleted() for array in result.values())
    assert all((later[key] == i + 1).all() for i, key in enumerate(tree))


def test_damage_hands_out_nothing_and_harms_nothing(tmp_path, in_place):
    tree = {f"w{i}": jnp.full(1000, i, jnp.float32) for i in range(9)}
    path = saved(tmp_path, tree)
    [file] = (path / "d").iterdir()
    data = bytearray(file.read_bytes())
    at = data.index(np.full(1000, 4, np.float32).tobytes())
    data[at + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(jaxckpt.CorruptCheckpointError) as caught:
        jaxckpt.restore(path, tree)
    assert caught.value.keys == ("w4",)
    rest, _ = jaxckpt.restore(path, {**tree, "w4": ...})
    assert all((rest[key] == tree[key]).all() for key in tree if key != "w4")


def test_one_leaf_reads_little_more_than_itself(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tree = {f"small{i}": rng.standard_normal(128) for i in range(300)}
    tree["large"] = rng.standard_normal((4, MIB))
    path = saved(tmp_path, tree)
    read = []
    real = os.preadv

    def count(handle, buffers, offset):
        read.append(real(handle, buffers, offset))
        return read[-1]

    reader = jaxckpt.load_checkpoint(path)
    monkeypatch.setattr(os, "preadv", count)
    assert (reader["small150"] == tree["small150"]).all()
    assert sum(read) == 1024
    read.clear()
    assert (jaxckpt.restore(reader, {"small7": np.zeros(128)}).tree["small7"] == tree["small7"]).all()
    assert sum(read) == 1024


# ---- progress ----


def test_progress_is_told_as_chunks_are_read(tmp_path):
    tree = {"a": np.zeros(10 * MIB), "b": np.ones(3)}
    path = saved(tmp_path, tree)
    told, inside = [], []

    def report(done, total):
        inside.append(threading.get_ident())
        assert len(inside) == 1
        told.append((done, total))
        inside.pop()

    jaxckpt.restore(path, tree, progress=report).tree
    done, totals = zip(*told, strict=True)
    assert set(totals) == {80 * MIB + 24}
    assert done[0] == 0
    assert done[-1] == totals[0]
    assert list(done) == sorted(done)
    assert 4 <= len(done) <= 22


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_callback_that_raises_stops_the_restore_and_nothing_else(tmp_path, at):
    class Batches:
        state = 0

        def get_state(self):
            return {"position": self.state}

        def set_state(self, state):
            self.state = state["position"]

    saved_batches = Batches()
    saved_batches.state = 9
    tree = {"a": np.zeros(4 * MIB), "b": jnp.ones(3 * MIB), "data": saved_batches}
    path = saved(tmp_path, tree)
    target = {**tree, "data": Batches()}
    told = []

    def report(done, total):
        told.append(done)
        if len(told) == at:
            raise KeyError("mine")

    threads = threading.active_count()
    with pytest.raises(KeyError, match="mine"):
        jaxckpt.restore(path, target, progress=report)
    assert len(told) == at
    assert target["data"].state == 0
    assert threading.active_count() <= threads + 1  # the one that JAX objects are made in stays
    assert jaxckpt.restore(path, target).tree["data"].state == 9


# ---- memory ----

MEASURE = """
import gc, json, sys
import jax, numpy as np
import jaxckpt

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

path, limit, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shapes = jaxckpt.list_variables(path)
target = {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in shapes}
first = min(target)
jaxckpt.restore(path, {first: target[first]}).tree  # programs, threads
peaks = []
for _ in range(count):
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    tree = jaxckpt.restore(path, target, memory_limit=limit).tree
    jax.block_until_ready(tree)
    peaks.append((before, status("VmHWM")))
    del tree
print(json.dumps(peaks))
"""


def peaks(path, limit, count=1):
    """For each restore the resident bytes before it and at its peak, in a process of its own."""
    arguments = [sys.executable, "-c", MEASURE, str(path), str(limit), str(count)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("alike", [True, False])
def test_peak_memory_is_the_result_and_the_limit(tmp_path, alike):
    # Alike, they are read in place; of many shapes, they are copied.
    shapes = [(1024, 1024) if alike else (900 + 4 * i, 1024) for i in range(48)]
    path = saved(tmp_path, {f"w{i:02d}": np.ones(shape, np.float32) for i, shape in enumerate(shapes)})
    result, limit = 4 * sum(a * b for a, b in shapes), 32 * MIB
    [(before, peak), *later] = peaks(path, limit, count=8)
    assert peak - before <= result + limit + 24 * MIB
    assert peak - before >= result * 0.9  # what is measured is there
    assert max(peak for _, peak in later) <= peak + 64 * MIB  # no ratchet


# ---- placing ----


def test_many_small_sharded_arrays_are_put_by_one_call(tmp_path, monkeypatch):
    where = NamedSharding(jax.make_mesh((8,), ("d",)), P("d"))
    tree = {f"w{i}": jax.device_put(np.full((8, 16), i, np.float32), where) for i in range(50)}
    path = saved(tmp_path, tree)
    calls = []
    real = jax.device_put
    monkeypatch.setattr(
        jax, "device_put", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    )
    result, _ = jaxckpt.restore(path, tree)
    assert len(calls) == 1
    assert all((result[key] == tree[key]).all() for key in tree)
    assert all(result[key].sharding == where for key in tree)


def test_keys_and_their_bits_do_not_mix():
    where = NamedSharding(jax.make_mesh((8,), ("d",)), P())
    targets = [jax.random.key(1), jax.random.key_data(jax.random.key(2))] * 2
    targets += [jax.device_put(target, where) for target in targets]
    specs = [jaxckpt.graph.flatten.flatten(t, target=True).graph.leaves[0].spec for t in targets]
    results = devices.place(
        [
            devices.Placement(host=devices.hold(target), spec=spec, like=target)
            for target, spec in zip(targets, specs, strict=True)
        ]
    )
    for result, target in zip(results, targets, strict=True):
        assert jax.typeof(result) == jax.typeof(target)
        assert result.sharding == target.sharding
        assert devices.hold(result).tobytes() == devices.hold(target).tobytes()
