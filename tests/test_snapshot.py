"""What a save holds on to, and how much memory that takes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import saving, snapshot
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.pytree import leaves
from jaxckpt.storage import hold
from jaxckpt.writer import writer

ROOT = Path(jaxckpt.__file__).parents[1]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4, jnp.float8_e4m3fn, jnp.bool_, jnp.complex64)


def state(number):
    """A tree of every kind of array, each of which says which number it was made for."""
    mesh = jax.make_mesh((8,), ("a",))
    spread = jax.NamedSharding(mesh, jax.P("a"))
    base = np.random.default_rng(number).integers(0, 2, 64)
    return {
        "jax": {dtype.__name__: jnp.asarray(base, dtype) for dtype in DTYPES},
        "large": jnp.full((300, 1024), number, jnp.float32),
        "sharded": jax.device_put(base.astype(np.int32), spread),
        "copies": jax.device_put(base.astype(np.float32), jax.NamedSharding(mesh, jax.P())),
        "key": jax.random.key(number),
        "keys": jax.random.split(jax.random.key(number), 3),
        "ref": jax.new_ref(jnp.asarray(base)),
        "numpy": base.copy(),
        "strided": np.stack([base, base], 1)[:, 0],
        "big_endian": base.astype(">i4"),
        "text": np.array([f"{number:05d}"]),
    }


def plain(tree):
    """The bytes of every leaf, copied."""
    tree = jax.tree.map(lambda x: x[...] if isinstance(x, jax.Ref) else x, tree)
    tree = jax.tree.map(
        lambda x: jax.random.key_data(x) if "key" in str(getattr(x, "dtype", "")) else x, tree
    )
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


@jax.jit
def other(tree):
    return jax.tree.map(
        lambda x: x if "key" in str(x.dtype) else x ^ 1 if x.dtype == bool else x * 0 + 1, tree
    )


donate = jax.jit(lambda tree: other(tree), donate_argnums=0)


def scribble(tree):
    """Donates every array of JAX's and writes over all that can be written to."""
    tree["ref"][...] = tree["ref"][...] * 0 - 1
    for array in (tree["numpy"], tree["strided"], tree["big_endian"]):
        array[...] = -1
    tree["text"][...] = "?"
    keys = {name: tree.pop(name) for name in ("key", "keys")}
    given = {name: tree.pop(name) for name in ("jax", "large", "sharded", "copies")}
    jax.block_until_ready(donate(given))
    for array in keys.values():
        array.delete()
    tree.clear()


@pytest.fixture
def quick_path(tmp_path):
    """A directory in memory where there is one: a thousand saves are no test of the disk."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    path = tempfile.mkdtemp(dir="/dev/shm")
    yield Path(path)
    shutil.rmtree(path)


def test_a_thousand_rounds_of_donating_and_scribbling(quick_path):
    for number in range(1000):
        tree = state(number) if number % 20 == 0 else small(number)
        wanted = plain(tree)
        future = jaxckpt.save_async(quick_path / "a", tree, overwrite=number > 0)
        (scribble if number % 20 == 0 else scribble_small)(tree)
        future.result()
        saved = jaxckpt.restore(quick_path / "a", sharding=np.ndarray).tree
        assert plain(saved) == wanted, number


def small(number):
    base = np.full(8, number, np.int32)
    return {"a": jnp.asarray(base) + 0, "b": jnp.asarray(base, jnp.bfloat16) + 0, "n": base}


_small = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)


def scribble_small(tree):
    jax.block_until_ready(_small({"a": tree.pop("a"), "b": tree.pop("b")}))
    tree["n"][...] = -1


def test_a_view_is_held_where_there_is_one():
    flat = flatten(state(0))
    taken = snapshot.take_snapshot(flat)
    nbytes, copies = snapshot.sizes(flat)
    views = [buffer for buffer in taken.held.buffers if isinstance(buffer, memoryview)]
    assert len(views) == 5  # float32, int8, bool, complex64, large
    assert nbytes - copies >= 300 * 1024 * 4
    assert taken.held.nbytes < copies + 1000


# What does not fit is not copied


def test_what_does_not_fit_in_the_limit_is_read_where_it_lies(tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr(hold, "hold_all", lambda *args, **kwargs: copied.append(args))
    tree = state(3)
    wanted = plain(tree)
    future = jaxckpt.save_async(tmp_path / "a", tree, memory_limit=1000)
    scribble(tree)  # the call has returned: the values are written
    report = future.result()
    assert plain(jaxckpt.restore(tmp_path / "a", sharding=np.ndarray).tree) == wanted
    assert report.seconds_blocked >= report.stages["write"]
    assert not copied


@pytest.mark.parametrize("make", ["np.full", "jnp.full"])
def test_ten_saves_take_no_more_than_the_limit_beside_the_state(quick_path, make):
    code = f"""
        import numpy as np, jax, jax.numpy as jnp, shutil, jaxckpt
        path = {str(quick_path / "p")!r}
        jaxckpt.save(path, {{"a": jnp.ones(3), "b": np.ones(3)}}); shutil.rmtree(path)
        def status(name):
            line, = [line for line in open("/proc/self/status") if line.startswith(name)]
            return int(line.split()[1]) >> 10
        for size, count in ((4 << 20, 6), (1 << 15, 500)):
            tree = jax.block_until_ready([{make}(size, i, np.float32) for i in range(count)])
            open("/proc/self/clear_refs", "w").write("5")
            before = status("VmRSS")
            for i in range(10):
                jaxckpt.save(path, tree, memory_limit=16 << 20); shutil.rmtree(path)
            print(status("VmHWM") - before)
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not say how much memory a process has taken")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    large, small = map(int, done.stdout.split())
    assert large <= 24  # written from the memory that they lie in
    assert small < 64  # copied, within the limit; the rest is what the C library keeps in pieces


def test_an_interrupted_call_commits_nothing(tmp_path, monkeypatch):
    write, reading, go = saving.write_stage, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        reading.set()
        assert go.wait(10)
        return write(*args, **kwargs)

    def interrupt():
        assert reading.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(saving, "write_stage", slow)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        jaxckpt.save_async(tmp_path / "a", {"x": np.ones(1000)}, memory_limit=100)
    thread.join()
    go.set()
    monkeypatch.undo()
    jaxckpt.save(tmp_path / "b", {"x": 1})  # waits for the one before, whose failure nobody has seen
    [failed] = [future for future in writer.unseen() if future.path == str(tmp_path / "a")]
    with pytest.raises(jaxckpt.SaveError, match="interrupted"):
        failed.result()
    assert os.listdir(tmp_path) == ["b"]


# Copies on the devices: an accelerator is what is not a CPU, so that here a CPU can stand for one


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(leaves, "_how_to_show", lambda value: None)
    monkeypatch.setattr(leaves, "_known", {})
    monkeypatch.setattr(hold, "on_cpu", lambda sharding: False)


@pytest.mark.parametrize("how", ["host", "device"])
@pytest.mark.usefixtures("accelerator")
def test_arrays_of_an_accelerator(tmp_path, how):
    tree = state(5)
    wanted = plain(tree)
    future = jaxckpt.save_async(tmp_path / "a", tree, snapshot=how)
    scribble(tree)
    future.result()
    assert plain(jaxckpt.restore(tmp_path / "a", sharding=np.ndarray).tree) == wanted


@pytest.mark.usefixtures("accelerator")
def test_the_copies_are_made_on_the_devices_if_they_have_room(monkeypatch):
    flat = flatten(state(6))
    taken = snapshot.take_snapshot(flat, "device")
    away = [buffer for buffer in taken.held.buffers if isinstance(buffer, hold.Borrowed)]
    assert len(away) == 12  # all but the Ref and what is numpy's
    monkeypatch.setattr(hold, "_have_room", lambda arrays: False)
    taken = snapshot.take_snapshot(flat, "device")
    assert not any(isinstance(buffer, hold.Borrowed) for buffer in taken.held.buffers)


@pytest.mark.usefixtures("accelerator")
def test_nothing_stays_on_the_host_with_the_callers_array():
    array = jnp.ones((4, 4), jnp.bfloat16)
    hold.hold_all([array], [None])
    assert array._npy_value is None


def test_room_is_what_each_device_has_free(monkeypatch):
    class Device:
        def __init__(self, free):
            self.free = free

        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 1000 - self.free}

    class Sharding:
        def __init__(self, *devices):
            self.addressable_devices = devices

        def shard_shape(self, shape):
            return (shape[0] // len(self.addressable_devices),)

    class Array:
        shape, dtype = (100,), np.dtype("float32")

        def __init__(self, *devices):
            self.sharding = Sharding(*devices)

    a, b = Device(400), Device(200)
    assert hold._have_room([Array(a)])
    assert not hold._have_room([Array(b)])
    assert hold._have_room([Array(a, b)])
    assert not hold._have_room([Array(a, b), Array(b)])
