"""The main job, as a user starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxckpt


def demo(*arguments, cwd):
    env = {**os.environ, "PYTHONPATH": str(Path(jaxckpt.__file__).parents[1]), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "jaxckpt", "demo", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def done(directory):
    return demo(".", cwd=directory)


@pytest.fixture(scope="module")
def parts(done):
    """The printed text by the number of its part."""
    assert done.returncode == 0, done.stdout + done.stderr
    pieces = re.split(r"^== (\d)\. ", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(map(int, pieces[::2]), pieces[1::2], strict=True))


def saved_steps(text):
    return [int(step) for step in re.findall(r"^Saved checkpoint for step (\d+): ", text, flags=re.MULTILINE)]


def test_it_ends_well_and_says_nothing_on_stderr(done):
    assert (done.returncode, done.stderr) == (0, "")


def test_the_straight_run(parts):
    assert "Initializing from scratch.\n" in parts[1]
    assert saved_steps(parts[1]) == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert re.search(r"^Saved checkpoint for step 10: .*/straight/ckpt-10 \(loss \d", parts[1], re.MULTILINE)


def test_the_killed_run_has_lost_nothing_that_was_said_to_be_saved(parts):
    half = re.search(r"^Half-written: \.ckpt-(\d+)\.", parts[2], re.MULTILINE)
    assert half
    whole = re.search(r"^Whole: (.*)$", parts[2], re.MULTILINE)[1].split(", ")
    assert f"ckpt-{half[1]}" not in whole
    assert f"ckpt-{saved_steps(parts[2])[-1]}" in whole
    assert len(whole) == 3


def test_the_same_program_resumes(parts):
    newest = saved_steps(parts[2])[-1]
    restored = re.search(r"^Restored from .*/killed/ckpt-(\d+)$", parts[3], re.MULTILINE)
    assert int(restored[1]) >= newest  # a save may have ended just before the kill, unsaid
    assert saved_steps(parts[3])[-1] == 100
    assert re.search(r"^The half-written \.ckpt-\S+ is swept\.$", parts[3], re.MULTILINE)
    same = re.search(r"^(\d+) of (\d+) values of ckpt-100 are bit-equal", parts[3], re.MULTILINE)
    assert same[1] == same[2] == "23"


def test_the_graph_shows_the_slots(parts):
    assert parts[4].count("optimizer/mu: float32") == parts[4].count("optimizer/nu: float32") == 6


def test_the_changed_chain_keeps_every_moment(parts):
    assert "Restored from " in parts[5]
    assert "Restore: 23 restored, 1 missing" in parts[5]
    assert "12 of 12 moments are bit for bit those of the checkpoint." in parts[5]
    assert "Training goes on: step 101, " in parts[5]


def test_what_is_left_on_disk(done, directory):
    root = directory / "jaxckpt-demo"
    assert [path.name for path in directory.iterdir()] == ["jaxckpt-demo"]
    for run in ("straight", "killed"):
        reader = jaxckpt.load_checkpoint(root / run)
        assert int(reader["step"]) == 100
        assert not [path for path in (root / run).iterdir() if "jaxckpt-tmp" in path.name]


def test_without_a_command_it_says_what_there_is(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(jaxckpt.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-m", "jaxckpt"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "usage: jaxckpt" in run.stderr
