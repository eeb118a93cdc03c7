"""The comparisons run, and tell the truth about who restored what: no time is asserted."""

import json
import math
import os
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from bench import __main__ as bench
from bench import bars, chart, memory, peers, special, timing, undigested, workloads

import jaxckpt

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One quick run of all peers: each round 0 compares what was restored with what was saved."""
    directory = tmp_path_factory.mktemp("bench")
    work, out = directory / "work", directory / "out"
    work.mkdir()
    out.mkdir()
    options = "--quick --rounds 1 --no-memory --only 1000x256B --only transformer --only one-leaf"
    files = ["--directory", work, "--json", out / "all.json", "--svg", out / "all.svg"]
    code = bench.main([*options.split(), *map(str, files), "--peers", ",".join(peers.PEERS)])
    assert code == 0
    assert list(work.iterdir()) == []  # nothing is left behind
    return json.loads((out / "all.json").read_text()), (out / "all.svg").read_text()


def test_every_figure_of_every_peer_is_told(measured):
    told, _ = measured
    assert list(told["workloads"]) == ["1000x256B", "transformer"]
    for workload in told["workloads"].values():
        assert list(workload["peers"]) == list(peers.PEERS)
        for peer, figures in workload["peers"].items():
            assert set(figures) == {"blocked", "save", "restore", "files", "nbytes"}
            assert all(len(several) == 1 and 0 < several[0] < math.inf for several in figures.values())
            assert figures["blocked"] <= figures["save"]
            for field in timing.FIELDS:
                assert workload["ratios"][peer][field] == pytest.approx(
                    workload["medians"][peer][field] / workload["medians"]["jaxckpt"][field]
                )
    few = told["workloads"]["1000x256B"]
    assert (few["leaves"], few["nbytes"]) == (20, 20 * 256)
    assert few["peers"]["raw"]["nbytes"] == [20 * 256]
    assert few["peers"]["raw"]["files"] == few["peers"]["safetensors"]["files"] == [1]
    assert {"cores", "processor", "python", "jax", "orbax-checkpoint"} <= set(told["machine"])


def test_a_transformer_with_adam_is_three_times_its_parameters():
    full = workloads.workloads(quick=False)["transformer"].abstract()
    params = workloads.nbytes(full["params"])
    assert params / 4 == pytest.approx(100e6, rel=0.02)
    assert workloads.nbytes(full) == 3 * params + 4 + 4  # adam's count, and the step


def test_the_bytes_that_one_leaf_takes_are_counted(measured):
    told, _ = measured
    for figures in told["special"]["one-leaf"]["contenders"].values():
        if os.path.exists("/proc/self/io"):
            assert workloads.KIB <= figures["nbytes"][0] < 64 * workloads.KIB


def test_the_chart_has_a_bar_for_each_figure(measured):
    told, text = measured
    root = ElementTree.fromstring(text)
    drawn = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class", "").startswith("bar")]
    assert len(drawn) == 2 * len(peers.PEERS) * len(timing.FIELDS)
    width, height = (float(root.get(side, "0")) for side in ("width", "height"))
    for rect in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(rect.get(name, "nan")) for name in ("x", "y", "width", "height"))
        assert wide > 0 <= x
        assert x + wide <= width
        assert y + high <= height
    texts = ["".join(part.itertext()) for part in root.iter(f"{SVG}text")]
    assert set(peers.PEERS) <= set(texts)
    assert chart.draw(told) == text


class Liar(peers.Jaxckpt):
    """Restores the target itself."""

    name = "liar"

    def restore(self, path, target):
        return target


def test_a_peer_that_restores_something_else_is_found(tmp_path):
    tree = {"a": jnp.arange(3.0)}
    with pytest.raises(ValueError, match="liar did not restore what it saved"):
        timing.measure([Liar], tree, tmp_path, rounds=1)


def test_equal_sees_one_bit():
    tree = {"a": jnp.arange(3.0), "b": jnp.int32(0)}
    assert workloads.equal(tree, workloads.fresh(tree))
    assert not workloads.equal(tree, {**tree, "a": jnp.array([0.0, 1.0, np.nextafter(np.float32(2), 3)])})
    assert not workloads.equal(tree, {**tree, "b": jnp.float32(0)})
    assert not workloads.equal(tree, {"a": tree["a"]})


def test_without_digests_nothing_is_hashed(tmp_path):
    tree = {"a": jnp.arange(1000.0), "b": jnp.ones((3, 1 << 18))}
    size = workloads.nbytes(tree)
    with undigested.undigested(size):
        jaxckpt.save(tmp_path / "without", tree)
    with undigested.undigested(size):
        restored = jaxckpt.restore(tmp_path / "without", tree).tree
    assert workloads.equal(restored, tree)
    with pytest.raises(jaxckpt.CorruptCheckpointError):  # its digests are no digests
        jaxckpt.restore(tmp_path / "without", tree)
    jaxckpt.save(tmp_path / "with", tree)  # and all is as it was
    assert workloads.equal(jaxckpt.restore(tmp_path / "with", tree).tree, tree)


def test_a_patch_that_misses_the_digests_is_found():
    with pytest.raises(RuntimeError, match="hashed 0 of 1 bytes"), undigested.undigested(1):
        pass


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the mark cannot be set back")
def test_the_peak_is_that_of_the_call_alone():
    size = 64 * workloads.MIB
    more = np.ones(4 * size, np.uint8).sum()  # a higher peak before
    grown = memory._growth(lambda: np.ones(size, np.uint8))
    assert more == 4 * size
    assert size <= grown + workloads.MIB < size + 32 * workloads.MIB


def test_the_memory_of_a_save_is_measured_in_a_process_of_its_own(tmp_path):
    grown = memory.in_a_row("1000x256B", "jaxckpt", tmp_path, quick=True)
    assert len(grown) == memory.SAVES_IN_A_ROW
    assert all(0 <= one < 256 * workloads.MIB for one in grown)
    assert list(tmp_path.iterdir()) == []


def test_bars_tell_what_was_missed():
    def figures(save):
        return {"blocked": [0.5, 0.5], "save": save, "restore": [1.0, 1.0], "files": [11], "nbytes": [1]}

    told = {"special": {}, "workloads": {"5000x1KiB": {"peers": {}}}}
    assert bars.bars(told) == []
    several = told["workloads"]["5000x1KiB"]["peers"]
    several.update({"jaxckpt": figures([1.0, 1.0]), "orbax v0": figures([41.0, 39.9])})
    found = {bar.what: (bar.value, bar.met) for bar in bars.bars(told)}
    assert found["5000 x 1 KiB, save"] == ("40.5x", True)
    assert found["5000 x 1 KiB, blocked"] == ("1.0x", False)
    assert found["5000 x 1 KiB, files"] == ("11", False)
    assert not any("100 x 10 MiB" in what for what in found)  # that was not measured


def test_one_leaf_out_of_many_is_compared(tmp_path, monkeypatch):
    class Wrong(dict):
        def close(self):
            pass

    monkeypatch.setattr(jaxckpt, "load_checkpoint", lambda path: Wrong(small=np.zeros(256, np.float32)))
    with pytest.raises(ValueError, match="not what was saved"):
        special.one_leaf(tmp_path, quick=True, rounds=1)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--peers", "nobody"])
    assert ended.value.code == 2
    assert "there is no peer nobody" in capsys.readouterr().err
