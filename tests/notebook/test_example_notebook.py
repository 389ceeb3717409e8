"""The example notebook runs in a real kernel, and what is stored in it came from such a run.

To store its outputs anew: ``AUTOBATCH_WRITE_EXAMPLE=1 pytest tests/notebook/test_example_notebook.py``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import autobatch

ROOT = Path(autobatch.__file__).parents[1]
PATH = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def executed(monkeypatch):
    notebook = nbformat.read(PATH, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}
    ).execute()
    return notebook


def without_noise(notebook):
    """Less what differs from machine to machine and says nothing: TensorFlow's log, and when each cell ran."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.read(PATH, as_version=4).metadata
    return notebook


def outputs_of(notebook, source):
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(source)]
    return cell.outputs


def html_of(notebook, source):
    return "".join(output.data.get("text/html", "") for output in outputs_of(notebook, source) if "data" in output)


def check(notebook):
    shown = html_of(notebook, "%autobatch")
    assert shown.count("autobatch sizing report") == 1
    assert shown.count("<svg") == 2
    assert "<summary>Plan: effective batch 256 = " in shown
    assert "<summary>Plan: effective batch 256 = " in html_of(notebook, "history = ")
    epochs = [output.text for output in outputs_of(notebook, "history = ") if output.get("name") == "stdout"]
    assert "val_accuracy" in "".join(epochs)
    assert "micro-batch" in html_of(notebook, "history.plan")
    assert "a sample" in html_of(notebook, "history.report.memory_model")


@pytest.mark.slow
def test_it_runs_and_shows_the_report(monkeypatch):
    notebook = executed(monkeypatch)
    check(notebook)
    if os.environ.get("AUTOBATCH_WRITE_EXAMPLE"):
        nbformat.write(without_noise(notebook), PATH)


def test_the_stored_outputs_are_of_such_a_run():
    check(nbformat.read(PATH, as_version=4))
    text = PATH.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/<])/\w+/\w+", text), "a path of the machine that it was run on"
    assert "site-packages" not in text
    assert "stderr" not in text
    assert len(text) < 100_000
