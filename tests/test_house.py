"""The house keeps its shape: which room may know which, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch

ROOT = Path(autobatch.__file__).parent
ROOMS = {
    "records": {"display"},
    "display": set(),
    "errors": set(),
    "units": set(),
    "version": set(),
    "arguments": {"units"},
    "search": {"records", "errors", "units"},
    "report": {"records", "errors", "units"},
    "cache": {"records", "errors", "units"},
    "memory": {"records", "errors", "units"},
    "training_history": {"records"},
    "train": {"records", "errors", "units", "memory", "trial", "training_history"},
    "trial": {"records", "errors", "units", "memory", "train", "api", "version"},
    "remembering": {"records", "errors", "search", "trial", "cache"},
    "searching": {"records", "errors", "units", "search", "trial", "remembering", "memory"},
    "remedies": {"records", "errors", "units", "trial", "memory"},
    "api": {
        "records",
        "errors",
        "units",
        "arguments",
        "display",
        "search",
        "searching",
        "train",
        "training_history",
        "trial",
        "memory",
        "cache",
        "remedies",
    },
    "cli": {
        "records",
        "errors",
        "units",
        "arguments",
        "remedies",
        "report",
        "trial",
        "api",
        "memory",
        "cache",
        "version",
    },
    "notebook": {"records", "errors", "units", "display", "report", "api", "cli"},
}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "autobatch":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autobatch."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_arrows(room):
    home = ROOT / room
    files = list(home.rglob("*.py")) if home.is_dir() else [ROOT / f"{room}.py"]
    assert files
    for path in files:
        strangers = set(imported_rooms(path)) - ROOMS[room] - {room}
        assert not strangers, f"{path.name} imports from {strangers}"


def test_every_room_is_on_the_plan():
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == {*ROOMS, "__init__", "__main__"}


def test_only_the_seams_touch_what_is_private_in_keras():
    for path in ROOT.rglob("*.py"):
        if path.name.endswith("_seams.py"):
            continue
        text = path.read_text(encoding="utf-8")
        assert "keras.src" not in text, path
        private = r"\b(?:model|layer|optimizer|metric|loss|backup|adapter|strategy|extended)\._[a-z]\w+"
        assert not re.findall(private, text), path


def test_public_names():
    assert sorted(autobatch.__all__) == autobatch.__all__
    for name in autobatch.__all__:
        assert getattr(autobatch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'batch_size'"):
        autobatch.batch_size  # noqa: B018 - reading it is the test


def test_the_examples_use_public_names_alone():
    for path in (ROOT.parent / "examples").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        assert not list(imported_rooms(path)), path
        used = {
            node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "autobatch"
        }
        assert used <= set(autobatch.__all__), path


def test_the_version_is_written_once():
    version = ROOT / "version.py"
    assert f'__version__ = "{autobatch.__version__}"' in version.read_text(encoding="utf-8")
    assert not list(imported_rooms(version)), "what builds the package reads it before there is anything to import"
    project = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert 'path = "autobatch/version.py"' in project
    assert not re.search(r"^version *=", project, re.MULTILINE)
    others = [path for path in ROOT.rglob("*.py") if path != version]
    assert not [path for path in others if f'"{autobatch.__version__}"' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("statement", ["import autobatch", "import autobatch.cli, autobatch.api, autobatch.search"])
def test_tensorflow_is_loaded_late(statement):
    code = f"{statement}; import sys; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
