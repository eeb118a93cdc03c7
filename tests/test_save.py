"""`jaxckpt.save` and `save_async`: reports, promises on what can reach a checkpoint, failures."""

import os
import stat
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxckpt
from jaxckpt import saving as save_module
from jaxckpt.storage import directory


def test_the_report_says_what_was_done(tmp_path):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    report = jaxckpt.save(
        tmp_path / "a", {"net": params, "opt": optax.adam(1e-3).init(params), "step": 3, "f": jnp.sin}
    )
    assert report.path == str(tmp_path / "a")
    assert report.step is None
    assert (report.leaves, report.slots, report.slots_left_out) == (8, 4, 0)
    assert report.not_saved == ("f",)
    assert report.nbytes == sum(p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert 0 <= report.seconds_blocked <= report.seconds
    assert list(report.stages) == [
        "flatten",
        "wait",
        "snapshot",
        "queue",
        "plan",
        "write",
        "manifest",
        "commit",
    ]


def test_slots_without_their_parameters_are_left_out_and_said(tmp_path):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    state = optax.adam(1e-3).init(params)
    with pytest.warns(jaxckpt.SlotsLeftOutWarning, match=r"4 slots.*opt.*Values"):
        report = jaxckpt.save(tmp_path / "a", {"opt": state})
    assert (report.slots, report.slots_left_out) == (0, 4)
    assert list(jaxckpt.load_checkpoint(tmp_path / "a")) == ["opt/ScaleByAdamState/count"]
    assert jaxckpt.save(tmp_path / "b", {"net": params}).slots == 0
    report = jaxckpt.save(tmp_path / "c", {"opt": jaxckpt.Values(state)})
    assert (report.slots, report.slots_left_out, report.leaves) == (0, 0, 5)


def test_an_existing_path_is_only_replaced_when_asked(tmp_path):
    jaxckpt.save(tmp_path / "a", {"x": 1})
    with pytest.raises(jaxckpt.CheckpointExistsError, match="overwrite=True"):
        jaxckpt.save(tmp_path / "a", {"x": 2})
    assert jaxckpt.load_checkpoint(tmp_path / "a")["x"] == 1
    jaxckpt.save(tmp_path / "a", {"x": 2}, overwrite=True)
    assert jaxckpt.load_checkpoint(tmp_path / "a")["x"] == 2
    assert os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_saved_raises_with_its_key_and_leaves_nothing(tmp_path):
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="net/bad"):
        jaxckpt.save(tmp_path / "a", {"net": {"bad": {1, 2}}})
    assert os.listdir(tmp_path) == []

    @jax.jit
    def traced(x):
        jaxckpt.save(tmp_path / "a", {"net": {"x": x}})

    with pytest.raises(jaxckpt.UnsupportedLeafError, match="net/x"):
        traced(jnp.ones(2))


def test_donation_and_scribbling_cannot_reach_the_checkpoint(tmp_path):
    donate = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for round_ in range(30):
        host = np.full(5000, float(round_))
        ref = jax.new_ref(jnp.full(10, float(round_)))
        tree = {
            "w": jnp.full((200, 300), float(round_)),
            "small": jnp.full(3, float(round_)),
            "h": host,
            "r": ref,
            "l": [1, 2],
        }
        path = tmp_path / str(round_)
        future = jaxckpt.save_async(path, tree)
        donate(tree["w"]).block_until_ready()
        tree["small"].delete()
        host[:] = -1
        ref[...] = jnp.full(10, -1.0)
        tree["l"].append(3)
        tree.clear()
        future.result()
        reader = jaxckpt.load_checkpoint(path)
        for key in ("w", "small", "h", "r"):
            assert (reader[key] == round_).all(), key
        assert "l/2" not in reader


def test_copy_also_copies_what_may_alias_the_callers_memory(tmp_path, monkeypatch):
    gate = threading.Event()
    write = save_module.write_stage

    def slow(*args, **kwargs):
        assert gate.wait(10)
        return write(*args, **kwargs)

    monkeypatch.setattr(save_module, "write_stage", slow)
    buffer = np.zeros(1 << 16, np.float32)
    array = jax.device_put(buffer)
    future = jaxckpt.save_async(tmp_path / "a", {"x": array}, snapshot="copy")
    buffer[:] = 7
    gate.set()
    future.result()
    assert (jaxckpt.load_checkpoint(tmp_path / "a")["x"] == 0).all()
    with pytest.raises(ValueError, match="'host', 'device' or 'copy'"):
        jaxckpt.save_async(tmp_path / "b", {"x": array}, snapshot="gpu")


def test_the_same_state_gives_the_same_graph_in_any_process(tmp_path):
    code = """
import sys, optax, jax, jax.numpy as jnp, numpy as np, jaxckpt
p = {"b": jnp.ones(4), "a": [np.arange(3), "x", 2**80, float("nan")]}
jaxckpt.save(sys.argv[1], {"net": p, "opt": optax.adam(1e-3).init({"b": p["b"]}), "k": jax.random.key(0)})
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    import json

    graphs = []
    for seed in ("1", "2"):
        path = tmp_path / seed
        subprocess.run([sys.executable, "-c", code, path], check=True, env={**env, "PYTHONHASHSEED": seed})
        graphs.append(json.loads((path / "graph.json").read_bytes())["graph"])
    assert graphs[0] == graphs[1]


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        jaxckpt.save(tmp_path / "a", {"x": jnp.ones(5000)})
    finally:
        os.umask(old)
    for entry in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        mode = stat.S_IMODE(entry.stat().st_mode)
        assert mode == (0o750 if entry.is_dir() else 0o640), entry


def test_a_failed_save_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "sync_tree", full)
        with pytest.raises(jaxckpt.SaveError, match="No space left") as caught:
            jaxckpt.save(tmp_path / "a", {"x": jnp.ones(5000)})
        assert isinstance(caught.value, OSError)
    assert os.listdir(tmp_path) == []
    jaxckpt.save(tmp_path / "a", {"x": jnp.ones(5000)})


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(jaxckpt.SaveError, match="file"):
        jaxckpt.save(tmp_path / "file" / "a", {"x": 1})


def test_metadata_is_kept_and_never_matched(tmp_path):
    metadata = {"config": {"depth": 2, "lr": 3e-4, "names": ["a", None, True]}, "nan": float("inf")}
    jaxckpt.save(tmp_path / "a", {"x": 1}, metadata=metadata)
    assert jaxckpt.load_checkpoint(tmp_path / "a").metadata == metadata
    jaxckpt.restore(tmp_path / "a", {"x": 1}).status.assert_consumed()
    with pytest.raises(TypeError, match="metadata"):
        jaxckpt.save(tmp_path / "b", {"x": 1}, metadata={"x": jnp.ones(2)})


def test_futures(tmp_path):
    future = jaxckpt.save_async(tmp_path / "a", {"x": jnp.ones(2)})
    seen = []
    future.add_done_callback(lambda f: seen.append(f.result().path))
    assert future.result(30).path == str(tmp_path / "a")
    assert future.done()
    assert future.exception() is None
    assert not future.cancel()
    deadline = time.monotonic() + 5
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [str(tmp_path / "a")]


def test_progress_tells_bytes(tmp_path):
    seen = []
    tree = {"a": np.zeros(1 << 20, np.uint8), "b": jnp.zeros(100, jnp.uint8)}
    jaxckpt.save(tmp_path / "a", tree, progress=lambda *args: seen.append(args))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] == (1 << 20) + 100


def test_many_saves_from_many_threads(tmp_path):
    def work(number):
        for round_ in range(4):
            jaxckpt.save(tmp_path / f"{number}-{round_}", {"x": np.full(1000, number * 10 + round_)})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        for round_ in range(4):
            assert (
                jaxckpt.load_checkpoint(tmp_path / f"{number}-{round_}")["x"] == number * 10 + round_
            ).all()


def test_imports_of_a_first_save():
    """The first save after jax is there costs little beyond Orbax, and nothing that the program has not."""
    code = """
import sys, tempfile, time, jax, numpy as np
import orbax.checkpoint
before = set(sys.modules)
import jaxckpt
with tempfile.TemporaryDirectory() as d:
    start = time.perf_counter()
    from jaxckpt.saving import save
    spent = time.perf_counter() - start
    save(d + "/a", {"x": np.ones(2)})
print(spent, sorted({m.split(".")[0] for m in set(sys.modules) - before} & {"optax", "flax", "grain", "rich"}))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert run.stdout.split(" ", 1)[1].strip() == "[]"
