import asyncio
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from databases import array, locate, write
from orbax.checkpoint import type_handlers

from jaxckpt.errors import SaveError
from jaxckpt.storage import handler, kv

ROOT = Path(handler.__file__).parents[2]


def run(code, *, timeout=120):
    """Runs a program that changes Orbax's registry, or loses a thread, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def infos(directory, names):
    return [
        type_handlers.ParamInfo(
            name=name,
            parent_dir=handler.epath.Path(directory),
            is_ocdbt_checkpoint=True,
            ts_context=kv.context(),
        )
        for name in names
    ]


def test_driven_by_our_writer(tmp_path):
    big = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    arrays = [
        array("net.big", big, (256, 1024)),
        array("net.small", np.arange(3)),
        array(".jaxckpt/0", np.arange(4, dtype=np.uint8), raw=True),
    ]
    located = write(tmp_path, arrays, [("net.big", "tied")], memory_limit=1 << 20, writer=handler.write)
    assert located == locate(tmp_path)
    assert {value.key for value in located} == {
        *("net.big/.zarray", "net.big/0.0", "net.big/1.0", "tied/.zarray", "tied/0.0", "tied/1.0"),
        *("net.small/.zarray", "net.small/0", ".jaxckpt/0/0"),
    }
    restore = [type_handlers.ArrayRestoreArgs(sharding=jnp.zeros(1).sharding)] * 2
    reader = handler.GraphArrayHandler()
    got = asyncio.run(reader.deserialize(infos(tmp_path, ["net.big", "tied"]), restore))
    for each in got:
        np.testing.assert_array_equal(each, big)
    [meta] = asyncio.run(reader.metadata(infos(tmp_path, ["net.big"])))
    assert meta.shape == (512, 1024)


def test_nothing_to_write_is_a_database(tmp_path):
    assert [v.key for v in write(tmp_path, [], writer=handler.write)] == [".jaxckpt"]


def test_a_failed_write_raises(tmp_path):
    with pytest.raises(SaveError, match="cannot write"):
        write(tmp_path / "file" / "x\0y", [array("a", np.ones(3))], writer=handler.write)


def test_serialize_holds_device_arrays(tmp_path):
    value = jnp.arange(8.0) + 0
    writer = handler.GraphArrayHandler()
    [written] = handler._run(writer.serialize([value], infos(tmp_path, ["a"])))
    jax.jit(lambda x: x * 0, donate_argnums=0)(value)
    written.result()
    assert written.cancel()
    writer.finalize(handler.epath.Path(tmp_path))
    assert [v.key for v in locate(tmp_path)] == ["a/.zarray", "a/0"]
    writer.finalize(handler.epath.Path(tmp_path))
    [chunk] = [v for v in locate(tmp_path / "ocdbt.process_jaxckpt0") if v.key == "a/0"]
    np.testing.assert_array_equal(np.frombuffer(chunk.inline, np.float32), np.arange(8))
    assert json.loads((tmp_path / "array_metadatas" / "process_0").read_text())


def test_the_directory_that_never_comes(tmp_path):
    writer = handler.GraphArrayHandler(timeout=0.05)
    [written] = handler._run(writer.serialize([jnp.ones(2)], infos(tmp_path / "no", ["a"])))
    with pytest.raises(SaveError, match="did not make the directory"):
        written.result()
    [written] = handler._run(
        handler.GraphArrayHandler().serialize([jnp.ones(2)], infos(tmp_path / "no", ["a"]))
    )
    with pytest.raises(TimeoutError):
        written.result(timeout=0.01)
    written.cancel()
    with pytest.raises(SaveError, match="cancelled"):
        written.result()


REGISTERED = """
    import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp, sys, time
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxckpt.storage.handler import GraphArrayHandler
    import tempfile, pathlib
    root = pathlib.Path(tempfile.mkdtemp())
    mesh = jax.make_mesh((8,), ("a",))
    def tree():
        return {
            "w": jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), NamedSharding(mesh, P("a"))),
            "b": [jnp.ones(3, jnp.bfloat16), jnp.int32(7)], "k": jax.random.key(1), "n": np.arange(4), "s": 5,
            "big": jnp.arange(600_000, dtype=jnp.float32),
        }
    def same(got):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree()), strict=True):
            if isinstance(b, jax.Array) and jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
                assert jax.random.key_impl(a) == jax.random.key_impl(b)
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)
            assert not isinstance(b, jax.Array) or a.sharding == b.sharding
    orbax = ocp.type_handlers.get_type_handler(jax.Array)
    ocp.type_handlers.register_type_handler(jax.Array, GraphArrayHandler(), override=True)
    jit = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as c:
        c.save(root / "sync", tree()); same(c.restore(root / "sync"))
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as c:
        t = tree(); c.save(root / "async", t); jit({"w": t["w"], "big": t["big"]}); c.wait_until_finished()
    with ocp.StandardCheckpointer() as c: same(c.restore(root / "async", tree()))
    assert (root / "sync" / "ocdbt.process_jaxckpt0" / "m").exists()
    ocp.type_handlers.register_type_handler(jax.Array, orbax, override=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as c: same(c.restore(root / "sync"))
    with ocp.StandardCheckpointer() as c: same(c.restore(root / "async", tree()))
    print("ok")
"""


def test_registered_with_orbax():
    assert run(REGISTERED).endswith("ok\n")


def test_what_is_stored_otherwise_is_left_to_orbax(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tree = {"a": jnp.arange(2048.0), "b": jnp.ones((4, 4))}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(theirs, tree)  # compressed
    ours.mkdir()
    write(ours, [array(k, np.asarray(v)) for k, v in tree.items()], writer=handler.write)
    where = jnp.zeros(1).sharding
    exact = [
        type_handlers.ArrayRestoreArgs(sharding=where, global_shape=v.shape, dtype=v.dtype)
        for v in tree.values()
    ]
    cast = [type_handlers.ArrayRestoreArgs(sharding=where, dtype=jnp.bfloat16) for _ in tree]
    for directory, args in ((ours, exact), (ours, cast), (theirs, exact), (theirs, cast)):
        plain = handler._read_plain(infos(directory, tree), args)
        assert (plain is not None) == (directory == ours and args is exact)
        got = asyncio.run(handler.GraphArrayHandler().deserialize(infos(directory, tree), args))
        for each, want in zip(got, tree.values(), strict=True):
            np.testing.assert_array_equal(each, want.astype(each.dtype))


def test_a_failed_save_of_orbax_before_hangs_nothing():
    code = """
        import jax.numpy as jnp, orbax.checkpoint as ocp, numpy as np, sys, tempfile, pathlib
        sys.path.insert(0, "tests")
        from databases import array, write
        from jaxckpt.storage import handler, kv
        root = pathlib.Path(tempfile.mkdtemp()); (root / "file").write_text("")
        class Bad(ocp.PyTreeCheckpointHandler):
            async def async_save(self, *args, **kwargs): raise RuntimeError("boom")
        c = ocp.AsyncCheckpointer(Bad())
        try: c.save(root / "a", {"w": jnp.ones(3)}); c.wait_until_finished(); print("no error")
        except Exception as error: print("failed:", type(error).__name__)
        (root / "db").mkdir()
        write(root / "db", [array("a", np.ones(3))], writer=handler.write)
        h = handler.GraphArrayHandler()
        info = ocp.type_handlers.ParamInfo(name="a", parent_dir=handler.epath.Path(root), is_ocdbt_checkpoint=True, ts_context=kv.context())
        [f] = handler._run(h.serialize([jnp.ones(3)], [info])); f.result(timeout=20)
        print("ok")
    """
    out = run(code, timeout=60)
    assert "failed" in out
    assert out.endswith("ok\n")
