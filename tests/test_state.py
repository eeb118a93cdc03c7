"""What a directory holds, and the state file: a cache that may be lost or torn at any time."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace

import msgspec
import pytest

import jaxckpt
from jaxckpt.errors import CorruptCheckpointWarning, UnsupportedFormatError
from jaxckpt.storage import state
from jaxckpt.storage.manifest import decode, encode
from jaxckpt.storage.state import Row, State, next_number, number_of

CHECKPOINT_STATE = b'model_checkpoint_path: "ckpt-10"\nall_model_checkpoint_paths: "ckpt-9"\n'


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "ckpt-1"
    jaxckpt.save(path, {"a": 1})
    return path


@pytest.fixture
def put(tmp_path, saved):
    """Puts a checkpoint with a given manifest into the directory."""

    def put(name, **files):
        path = tmp_path / name
        shutil.copytree(saved, path)
        manifest = decode((path / "graph.json").read_bytes())
        manifest = msgspec.structs.replace(manifest, files=msgspec.structs.replace(manifest.files, **files))
        (path / "graph.json").write_bytes(encode(manifest))
        return path

    return put


def names(found):
    return [row.name for row in found.rows]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ckpt-0", 0), ("ckpt-12", 12), ("ckpt-007", None), ("ckpt--1", None), ("ckpt-", None), ("ckpt", None),
        ("ckpt-1a", None), ("ckpt-²", None), ("ckpt-٣", None), ("other-1", None), ("a-ckpt-1", None), (".ckpt-1", None),
    ],
)  # fmt: skip
def test_number_of(name, number):
    assert number_of(name, "ckpt") == number


def test_prefixes_with_dashes():
    assert number_of("a-1-2", "a-1") == 2
    assert number_of("a-1-2", "a") is None


def test_next_number():
    assert next_number(State(), [], "ckpt") == 1
    assert next_number(State(highest=7), ["ckpt-3"], "ckpt") == 8
    assert next_number(State(highest=7), ["ckpt-100", "other-900", "x"], "ckpt") == 101
    assert next_number(State(highest=7), ["ckpt-3"], "ckpt", pending=[8, 9]) == 10
    assert next_number(State(), ["ckpt-0"], "ckpt") == 1


def test_nothing_is_in_a_directory_that_is_not_there(tmp_path):
    assert state.view(str(tmp_path / "no")) == State()
    assert state.view(str(tmp_path)) == State()
    (tmp_path / "file").write_text("x")
    assert state.view(str(tmp_path / "file")) == State()
    state.check_ours(str(tmp_path / "no"))


def test_rows_come_in_the_order_of_commits(tmp_path, put):
    put("ckpt-30", sequence=1, step=30, committed=9.0)
    put("ckpt-11", sequence=3, step=11, committed=1.0, metrics={"loss": math.nan}, save_counter=40)
    put("mine", sequence=2, step=None, committed=5.0)
    found = state.view(str(tmp_path))
    assert names(found) == ["ckpt-30", "mine", "ckpt-11"]
    assert (found.highest, found.sequence) == (40, 3)
    assert math.isnan(found.rows[-1].metrics["loss"])
    assert found.rows[0].writer == "hand"


def test_what_is_no_checkpoint_is_passed_over(tmp_path, put):
    put("ckpt-1", sequence=1)
    put(".ckpt-2.jaxckpt-tmp-x", sequence=2)
    (tmp_path / "ckpt-3").write_text("a file")
    (tmp_path / "ckpt-4").mkdir()
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "graph.json").write_text('{"nodes": []}')  # another program's
    (tmp_path / "latest").symlink_to("ckpt-1")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert names(state.view(str(tmp_path))) == ["ckpt-1"]


def test_a_link_to_a_checkpoint_elsewhere_is_one(tmp_path, put):
    target = put("store", sequence=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt-1").symlink_to(target)
    assert names(state.view(str(tmp_path / "run"))) == ["ckpt-1"]


def test_the_state_file_is_exact(tmp_path, put):
    metadata = {"lr": 0.1, "inf": math.inf, "big": 10**30, "text": "\ud800é", "deep": [[1], {"": None}]}
    put("ckpt-1", sequence=1, step=1, metrics={"a": 0.1, "b": math.inf, "c": -math.inf, "d": 5e-324})
    found = state.view(str(tmp_path))
    found = replace(found, rows=tuple(replace(row, metadata=metadata) for row in found.rows))
    state.store(str(tmp_path), replace(found, highest=12, sequence=9))
    loaded = state.load(str(tmp_path))
    assert loaded == replace(found, highest=12, sequence=9)
    document = json.loads((tmp_path / "checkpoint").read_text())
    assert document["latest"] == "ckpt-1"
    assert str(tmp_path) not in (tmp_path / "checkpoint").read_text()


def test_manifests_that_are_known_are_not_read(tmp_path, put, monkeypatch):
    put("ckpt-1", sequence=1)
    put("ckpt-2", sequence=2)
    state.store(str(tmp_path), state.view(str(tmp_path)))
    read = []
    monkeypatch.setattr(
        state, "read_head", lambda path: read.append(os.path.basename(path)) or pytest.fail("read")
    )
    assert names(state.view(str(tmp_path))) == ["ckpt-1", "ckpt-2"]
    assert read == []


def test_a_step_that_was_saved_again_is_read_again(tmp_path, put):
    put("ckpt-1", sequence=1)
    put("ckpt-2", sequence=2)
    known = state.view(str(tmp_path))
    shutil.rmtree(tmp_path / "ckpt-1")
    put("ckpt-1", sequence=3)
    assert names(state.scan(str(tmp_path), known)) == ["ckpt-2", "ckpt-1"]


def test_a_quick_scan_sees_what_comes_goes_and_is_replaced(tmp_path, put):
    for n in (1, 2, 3):
        put(f"ckpt-{n}", sequence=n, writer="manager")
    put("mine", sequence=4)
    known = state.view(str(tmp_path))
    found = state.scan(str(tmp_path), known, quick=True)
    assert found == known
    assert all(new is old for new, old in zip(found.rows, known.rows, strict=True))
    shutil.rmtree(tmp_path / "ckpt-1")
    put("ckpt-4", sequence=6, writer="manager")
    os.rename(tmp_path / "ckpt-2", tmp_path / ".old")
    put("ckpt-2", sequence=7, writer="manager")
    manifest = decode((tmp_path / "mine" / "graph.json").read_bytes())
    again = msgspec.structs.replace(manifest, files=msgspec.structs.replace(manifest.files, sequence=5))
    (tmp_path / "mine" / "graph.json").write_bytes(encode(again))  # the same directory
    found = state.scan(str(tmp_path), known, quick=True)
    assert names(found) == ["ckpt-3", "mine", "ckpt-4", "ckpt-2"]
    assert found == state.scan(str(tmp_path), State())


def test_lines_that_are_kept_are_those_of_the_rows(tmp_path, put):
    for n in (1, 2):
        put(f"ckpt-{n}", sequence=n)
    lines = {}
    state.store(str(tmp_path), state.view(str(tmp_path)), lines)
    shutil.rmtree(tmp_path / "ckpt-1")
    found = state.view(str(tmp_path))
    found = replace(found, rows=(replace(found.rows[0], metadata="new"),))
    state.store(str(tmp_path), found, lines)
    assert state.load(str(tmp_path)) == found
    assert list(lines) == ["ckpt-2"]


def test_what_is_gone_is_not_listed_but_its_number_is_remembered(tmp_path, put):
    shutil.rmtree(put("ckpt-9", sequence=4, step=9).with_name("x"), ignore_errors=True)
    known = state.view(str(tmp_path))
    shutil.rmtree(tmp_path / "ckpt-9")
    assert state.scan(str(tmp_path), known) == State(highest=9, sequence=4)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"null", b"[]", b"3", b'{"format": "jaxckpt state"}', b"[" * 99999]
)
def test_a_torn_one_is_rebuilt_with_a_warning(tmp_path, put, content):
    put("ckpt-3", sequence=1, step=3)
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.warns(CorruptCheckpointWarning, match="checkpoint is damaged"):
        found = state.view(str(tmp_path))
    assert names(found) == ["ckpt-3"]
    assert found.highest == 3
    state.check_ours(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"sequence": "1"}, {"name": "../x"}, {"name": ".x"}, {"stamp": [1]}, {"stamp": None}, {"metrics": {"a": "z"}}, {"metrics": []}],
)  # fmt: skip
def test_a_row_that_makes_no_sense_is_damage(tmp_path, put, change):
    put("ckpt-3", sequence=1, step=3)
    state.store(str(tmp_path), state.view(str(tmp_path)))
    document = json.loads((tmp_path / "checkpoint").read_text())
    document["checkpoints"][0] |= change
    (tmp_path / "checkpoint").write_text(json.dumps(document))
    with pytest.warns(CorruptCheckpointWarning):
        assert names(state.view(str(tmp_path))) == ["ckpt-3"]


def test_a_later_releases_is_read_past_and_not_replaced(tmp_path, put):
    put("ckpt-3", sequence=1)
    (tmp_path / "checkpoint").write_text('{"format": "jaxckpt state", "version": 2, "all": "new"}')
    assert names(state.view(str(tmp_path))) == ["ckpt-3"]
    with pytest.raises(UnsupportedFormatError, match="upgrade jaxckpt"):
        state.check_ours(str(tmp_path))


@pytest.mark.parametrize(
    "content", [CHECKPOINT_STATE, b'\n  all_model_checkpoint_paths : "a"', b"model_checkpoint_path:''"]
)
def test_tensorflows_is_never_replaced(tmp_path, content):
    (tmp_path / "checkpoint").write_bytes(content)
    assert state.view(str(tmp_path)) == State()
    with pytest.raises(UnsupportedFormatError, match="TensorFlow"):
        state.check_ours(str(tmp_path))


def test_a_directory_in_its_place(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    assert state.view(str(tmp_path)) == State()
    with pytest.raises(UnsupportedFormatError, match="directory of its own"):
        state.check_ours(str(tmp_path))


def test_damage_is_listed_where_the_checkpoint_belongs(tmp_path, put):
    """While the state file knows where that is; otherwise it counts as the newest."""
    for n in (1, 2, 3):
        put(f"ckpt-{n}", sequence=n, step=n, writer="manager", metrics={"loss": 1.0})
    known = state.view(str(tmp_path))
    (tmp_path / "ckpt-1" / "graph.json").write_bytes(b"torn")
    os.unlink(tmp_path / "ckpt-2" / "graph.json")
    found = state.scan(str(tmp_path), known)
    assert names(found) == ["ckpt-1", "ckpt-2", "ckpt-3"]
    assert [bool(row.damage) for row in found.rows] == [True, True, False]
    assert found.rows[0].metrics == {"loss": 1.0}
    lost = state.view(str(tmp_path))
    assert names(lost) == ["ckpt-3", "ckpt-1", "ckpt-2"]
    assert lost.rows[-1].writer == ""


def test_damage_is_not_kept_in_mind(tmp_path, put):
    data = (put("ckpt-1", sequence=1) / "graph.json").read_bytes()
    known = state.view(str(tmp_path))
    (tmp_path / "ckpt-1" / "graph.json").write_bytes(data[:-5])
    known = state.scan(str(tmp_path), known)
    assert known.rows[0].damage
    (tmp_path / "ckpt-1" / "graph.json").write_bytes(data)
    assert not state.scan(str(tmp_path), known).rows[0].damage


def test_one_of_a_later_release_counts_as_the_newest(tmp_path, put):
    put("ckpt-1", sequence=1)
    path = put("ckpt-0", sequence=0)
    text = (path / "graph.json").read_bytes().replace(b'{"jaxckpt":1,', b'{"jaxckpt":2,', 1)
    (path / "graph.json").write_bytes(resealed(text))
    found = state.view(str(tmp_path))
    assert names(found) == ["ckpt-1", "ckpt-0"]
    assert found.rows[-1].unsupported
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        state.read_row(str(path))


def resealed(data):
    from jaxckpt.storage.chunks import digest

    start = data.index(b'"digest":"') + len(b'"digest":"')
    return data[:start] + digest(data[:start] + data[start + 32 :]).hex().encode() + data[start + 32 :]


def test_the_head_is_what_the_manifest_says(tmp_path, put):
    path = put("ckpt-1", sequence=5, step=4, metrics={"a": 1}, writer="manager", save_counter=6)
    row = state.read_row(str(path))
    files = decode((path / "graph.json").read_bytes()).files
    assert row == Row(
        name="ckpt-1", stamp=row.stamp, sequence=5, step=4, number=6, writer="manager", time=files.committed,
        metrics={"a": 1.0}, nbytes=files.nbytes,
    )  # fmt: skip
