"""Manifests of one structure: what is remembered is what would be read, and nothing else is taken for it."""

import json

import pytest
from graphs import make
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from jaxckpt.errors import CheckpointError, CorruptCheckpointError
from jaxckpt.graph.model import ArraySpec
from jaxckpt.storage import recall
from jaxckpt.storage.format.seal import parts, seal
from jaxckpt.storage.layout import layout
from jaxckpt.storage.manifest import Files, Manifest, decode, encode

F32 = ArraySpec(shape=(2, 3), dtype="float32")
FILES = Files(sequence=1, started=1.0, committed=2.0, tables={"chunks.process_0": b"t" * 16})
GRAPH = make({"a": F32, "b": [F32, F32]})


@pytest.fixture(autouse=True)
def nothing_known():
    recall._known.clear()


def manifest(number=0, graph=GRAPH, metadata=None):
    entries = layout(graph)
    digests = tuple(bytes([number, i] * 8) for i in range(len(entries)))
    files = replace(FILES, sequence=number)
    return Manifest(graph=graph, metadata=metadata, entries=entries, digests=digests, files=files)


def test_the_next_of_a_structure_is_read_from_memory():
    first, second = decode(encode(manifest(1, metadata={"x": [1]}))), encode(manifest(2, metadata={"x": [1]}))
    again = decode(second)
    assert again.graph is first.graph
    assert again == manifest(2, metadata={"x": [1]})
    again.metadata["x"].append(2)
    assert decode(second).metadata == {"x": [1]}
    recall._known.clear()
    assert decode(second) == manifest(2, metadata={"x": [1]})


def test_another_graph_or_other_metadata_are_another_text():
    first = decode(encode(manifest()))
    assert decode(encode(manifest(graph=make({"a": F32, "c": [F32, F32]})))).graph.leaves[1].key == "c/0"
    assert decode(encode(manifest(metadata=1))).metadata == 1
    assert decode(encode(manifest())).graph is first.graph


def test_metadata_with_such_fields_is_not_remembered():
    for value in ("0" * 32, "1" * 32):
        found = decode(encode(manifest(metadata={"digest": value, "text": '"digest":"' + "0" * 32 + '"'})))
        assert found.metadata["digest"] == value
    assert not recall._known


def forged(change, number=3):
    saved, files = map(json.loads, parts(encode(manifest(number))))
    change(saved, files)
    return seal(json.dumps(saved, separators=(",", ":")).encode(), json.dumps(files).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda saved, files: saved["entries"][0].update(digest="0" * 31 + "g"),
        lambda saved, files: saved["entries"][0].update(digest="0" * 31),
        lambda saved, files: files["tables"].update({"../x": "0" * 32}),
        lambda saved, files: files.update(sequence=-1),
        lambda saved, files: files.pop("sequence"),
        lambda saved, files: saved["graphs"][0]["leaves"][0].__setitem__(1, 99),
    ],
)
def test_a_known_structure_does_not_make_nonsense_pass(change):
    decode(encode(manifest()))
    assert recall._known
    with pytest.raises(CorruptCheckpointError):
        decode(forged(change))


@pytest.mark.parametrize("where", ["graph", "files"])
def test_a_part_that_says_more_than_its_own_is_not_remembered(where):
    decode(encode(manifest()))
    known = dict(recall._known)
    saved, files = parts(encode(manifest(2)))
    other, _ = parts(encode(manifest(4, graph=make({"z": F32}))))
    if where == "files":
        data = seal(saved, files + b',"graph":' + other)
    else:
        data = seal(saved + b',"graph":' + other, files)
    found = decode(data)  # JSON: of two fields of one name the last counts
    assert [leaf.key for leaf in found.graph.leaves] == ["z"]
    if where == "files":
        assert recall._known == known
    assert decode(encode(manifest(5))).graph.leaves[0].key == "a"
    assert [leaf.key for leaf in decode(data).graph.leaves] == ["z"]


def test_what_is_remembered_is_bounded(monkeypatch):
    one = len(parts(encode(manifest()))[0])
    monkeypatch.setattr(recall, "_MOST_BYTES", 3 * one)
    for i in range(10):
        decode(encode(manifest(graph=make({f"a{i}": F32, "b": [F32, F32]}))))
    assert 1 <= len(recall._known) <= 3
    monkeypatch.setattr(recall, "_MOST_BYTES", 0)
    assert decode(encode(manifest())).graph == GRAPH
    assert not recall._known


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_known_or_not_the_outcome_is_the_same(data):
    """Any change of one byte of the text, signed anew."""
    saved, files = parts(encode(manifest(7)))
    whole = bytearray(saved + files)
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(32, 126))
    changed = seal(bytes(whole[: len(saved)]), bytes(whole[len(saved) :]))

    def outcome():
        try:
            return decode(changed)
        except CheckpointError as error:
            return type(error), str(error)

    recall._known.clear()
    fresh = outcome()
    recall._known.clear()
    decode(encode(manifest(1)))
    assert outcome() == fresh
    assert outcome() == fresh


def test_a_match_is_found_again_beside_its_graph():
    from jaxckpt.graph.match import _Matcher, match
    from jaxckpt.graph.rules import Rules

    saved = decode(encode(manifest())).graph
    target, other = make({"a": F32, "b": [F32, F32]}), make({"a": F32, "b": [F32, F32]})
    first = match(saved, target)
    assert match(saved, target, Rules.of()) is first
    assert match(saved, target, Rules.of(fresh=("a",))).status.fresh == ("a",)
    assert match(saved, target) is first
    assert match(saved, other) is not first
    anew = _Matcher(saved, target, Rules()).run()
    assert (anew.fills, anew.status, anew.problems) == (first.fills, first.status, first.problems)
