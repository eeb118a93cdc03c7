"""Every notebook runs from top to bottom, in this interpreter, and prints what its text says."""

import asyncio
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import jaxckpt

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the running interpreter: none needs to be installed."""

    @property
    def kernel_spec(self):
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="this interpreter",
            language="python",
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a notebook once; returns it with its outputs."""
    done = {}

    def execute(path):
        if path not in done:
            notebook = nbformat.read(path, as_version=4)
            folder = tmp_path_factory.mktemp(path.stem)
            client = NotebookClient(
                notebook,
                kernel_manager_class=ThisInterpreter,
                timeout=300,
                resources={"metadata": {"path": str(folder)}},
            )
            # The package under test, also where it is not installed; one device, as a reader has.
            path_of_package = str(Path(jaxckpt.__file__).parents[1])
            env = {**os.environ, "PYTHONPATH": path_of_package, "XLA_FLAGS": ""}
            asyncio.run(client.async_execute(env=env))
            done[path] = notebook
        return done[path]

    return execute


def printed(notebook):
    """What all cells print or show, as one text."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                parts.append(output.text)
            else:
                parts.append(output.get("data", {}).get("text/plain", "") + "\n")
    return "".join(parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_without_a_word_on_stderr(run, path):
    for cell in run(path).cells:
        assert not [output for output in cell.get("outputs", []) if output.get("name") == "stderr"], (
            cell.source
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs"), "strip the outputs, so that differences stay small"
        assert cell.get("execution_count") is None


def test_training_checkpoints(run):
    text = printed(run(next(path for path in NOTEBOOKS if path.stem == "training_checkpoints")))
    lines = text.splitlines()
    assert "Initializing from scratch." in lines
    saved = [line for line in lines if line.startswith("Saved checkpoint for step ")]
    assert saved == [f"Saved checkpoint for step {10 * n}: ckpt-{n}" for n in range(1, 11)]
    assert "Restored from ckpt-5" in lines
    assert "['ckpt-8', 'ckpt-9', 'ckpt-10']" in lines
    losses = [float(line.removeprefix("loss ")) for line in lines if line.startswith("loss ")]
    assert len(losses) == 10
    assert losses[-1] < 1 < losses[0]
    assert "net/l1/kernel/.OPTIMIZER_SLOT/optimizer/mu" in text
    assert "False" not in lines  # of the comparisons shown as a cell's value
    assert lines.count("True") >= 4
