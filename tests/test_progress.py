"""Bars: in a terminal, in a notebook, and none in a log."""

import io
import sys
import threading
import types

import numpy as np
import pytest

import jaxckpt
from jaxckpt import progress
from jaxckpt.progress import Meter, shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, thing):
        self.shown.append(thing)


@pytest.fixture
def notebook(monkeypatch):
    """An IPython whose shell has a kernel, as far as a bar asks."""
    handle = Handle()

    def display(thing, display_id):
        assert display_id
        handle.shown.append(thing)
        return handle

    shell = types.SimpleNamespace(kernel=object())
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: shell
    module.display = types.ModuleType("IPython.display")
    module.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    return handle


def test_a_meter_begins_at_nothing_and_ends_with_all():
    told = []
    meter = Meter(lambda *args: told.append(args), 20 << 20)
    for _ in range(20 << 4):
        meter.add(1 << 16)
    meter.finish()
    assert told == [(n << 20, 20 << 20) for n in (0, 4, 8, 12, 16, 20)]
    told.clear()
    Meter(lambda *args: told.append(args), 0).finish()
    assert told == [(0, 0), (0, 0)]


def test_a_log_stays_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for wish in (None, False, True):
        with shown(wish, "Saving") as report:
            report(1, 2)
    assert not sys.stderr.getvalue()


def test_a_function_is_told_itself():
    told = []
    with shown(lambda *args: told.append(args), "Saving") as report:
        report(1, 2)
    assert told == [(1, 2)]


def test_a_terminal_shows_a_bar(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", Terminal())
    jaxckpt.save(tmp_path / "a", {"w": np.zeros(1000)})
    jaxckpt.restore(tmp_path / "a", progress=True).tree
    assert "Restoring" in sys.stderr.getvalue()
    assert "8.0/8.0 kB" in sys.stderr.getvalue()


def test_several_bars_share_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    errors = []

    def run(title):
        try:
            for _ in range(20):
                with shown(True, title) as report:
                    report(0, 100)
                    report(100, 100)
        except Exception as error:
            errors.append(error)

    with shown(True, "Saving") as outer:
        outer(0, 10)
        threads = [threading.Thread(target=run, args=(f"Restoring {i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outer(10, 10)
    assert errors == []
    assert progress._display is None
    assert "Saving" in sys.stderr.getvalue()  # bars that come and go between two looks are not drawn


def test_a_bar_ends_where_the_work_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="no"), shown(True, "Saving"):
        raise ValueError("no")
    assert progress._display is None


def test_a_notebook_shows_one_element_that_changes(notebook, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    with shown(True, "Restoring") as report:
        report(0, 2_000_000)
        report(1_500_000, 2_000_000)
        report(2_000_000, 2_000_000)
    assert [(bar.done, bar.total) for bar in notebook.shown] == [
        (0, 0),
        (0, 2_000_000),
        (1_500_000, 2_000_000),
        (2_000_000, 2_000_000),
    ]
    assert repr(notebook.shown[2]) == "Restoring: 1.5 of 2.0 MB"
    assert "<progress value='1500000' max='2000000'>" in notebook.shown[2]._repr_html_()


def test_a_notebook_is_not_flooded(notebook):
    with shown(True, "Saving") as report:
        for done in range(1001):
            report(done, 1000)
    assert len(notebook.shown) < 50
    assert notebook.shown[-1].done == 1000


def test_a_real_notebook_shows_it(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    from test_notebooks import ThisInterpreter

    code = f"""
import numpy as np, jaxckpt
tree = {{"a": np.zeros(1 << 20)}}
jaxckpt.save_async({str(tmp_path / "x")!r}, tree, progress=True).result()
jaxckpt.restore({str(tmp_path / "x")!r}, tree, progress=True).tree["a"].size
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_manager_class=ThisInterpreter, timeout=60).execute()
    texts = [output["data"]["text/plain"] for output in notebook.cells[0].outputs]
    assert texts == ["Saving: 8.4 of 8.4 MB", "Restoring: 8.4 of 8.4 MB", str(1 << 20)]
