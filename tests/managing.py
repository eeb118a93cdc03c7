"""What the tests of the manager share."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

import jaxckpt
from jaxckpt import saving
from jaxckpt.storage import lease

Manager = jaxckpt.CheckpointManager


def tree(value=0.0):
    return {"w": np.full(3, float(value))}


def value(restored):
    return float(restored.tree["w"][0])


@pytest.fixture
def broken(monkeypatch):
    """While it is set, saves fail in the background."""
    event = threading.Event()
    write = saving.write_stage

    def fail(*args, **kwargs):
        if event.is_set():
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_stage", fail)
    return event


@pytest.fixture
def gate(monkeypatch):
    """While it is not set, saves wait in the background, before they write."""
    event = threading.Event()
    write = saving.write_stage

    def wait(*args, **kwargs):
        assert event.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_stage", wait)
    yield event
    event.set()


def hidden(directory):
    return [name for name in os.listdir(directory) if name.startswith(".") and name != lease.FOLDER]
