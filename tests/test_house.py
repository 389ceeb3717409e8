"""The house keeps its shape: which room may know which, and what importing costs."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch

ROOT = Path(autobatch.__file__).parent
GROUND = {"records", "errors", "units", "version", "display"}
# What each room may import from, from the ground up. Lazy imports and modules named in strings count as well.
ROOMS: dict[str, set[str]] = {
    "version": set(),
    "types": set(),
    "display": set(),
    "units": set(),
    "record_codec": set(),
    "tracebacks": set(),
    "errors": {"tracebacks"},
    "arguments": {"units"},
    "records": {"display"},
    "training_history": {"records"},
    "seams": set(),
    "tensors": {"seams"},
    # Pure: none of these four knows TensorFlow's side of the house.
    "search": {"records", "errors", "units"},
    "report": {"records", "errors", "units", "record_codec"},
    "cache": {"records", "errors", "units"},
    "memory": {"records", "errors", "units"},
    "graphs": {"records", "seams", "tensors"},
    "losses": {"graphs", "seams", "tensors"},
    "averages": {"graphs", "seams", "tensors"},
    "metrics": {"graphs", "losses", "seams", "tensors"},
    "differences": {"graphs", "metrics", "seams", "tensors"},
    "step": {"averages", "differences", "graphs", "losses", "metrics", "seams", "tensors"},
    "data": {*GROUND, "memory", "seams", "step", "tensors"},
    "watch": {*GROUND, "memory", "seams"},
    "recovery": {*GROUND, "memory", "metrics", "step", "tensors"},
    "trial": {*GROUND, "differences", "graphs", "memory", "recovery", "seams", "step", "tensors"},
    "sizing": {*GROUND, "cache", "differences", "memory", "search", "trial"},
    "replicas": {*GROUND, "memory", "metrics", "recovery", "seams", "step", "tensors", "trial"},
    "train": {*GROUND, "data", "recovery", "replicas", "seams", "step", "training_history", "watch"},
    "opening": {*GROUND, "data", "replicas", "step", "trial"},
    "worker": {*GROUND, "memory", "opening", "record_codec", "seams", "tracebacks", "trial"},
    "remedies": {*GROUND, "memory", "trial", "worker"},
    "api": {
        *GROUND,
        *("arguments", "data", "opening", "remedies", "replicas", "search", "sizing", "step", "train"),
        *("training_history", "trial"),
    },
    "cli": {*GROUND, "api", "arguments", "cache", "memory", "remedies", "report", "trial", "worker"},
    "notebook": {*GROUND, "api", "cli", "report", "tracebacks"},
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
NAMED = re.compile(r"(?<![\w.])autobatch(?:\.\w+)+")


def docstrings(tree):
    """The string constants of a file that are documentation: statements of their own."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def imported_modules(path):
    """Every module of autobatch's that a file imports or names: at the top, within functions, and in strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = docstrings(tree)
    named = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports by name, not by dots"
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            named += NAMED.findall(node.value)
            # Code in a string, which another process runs.
            named += [f"{room}.{name}" for room, name in re.findall(r"from (autobatch[\w.]*) import (\w+)", node.value)]
    for name in named:
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES:
            yield name


def rooms_of(path):
    for module in imported_modules(path):
        if module != "autobatch":
            yield module.split(".")[1]


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    home = ROOT / room
    files = list(home.rglob("*.py")) if home.is_dir() else [ROOT / f"{room}.py"]
    assert files
    for path in files:
        strangers = set(rooms_of(path)) - ROOMS[room] - {room, "types"}
        assert not strangers, f"{path.name} imports from {strangers}"


def test_arrows_run_down():
    above = set(ROOMS)
    for room, known in ROOMS.items():
        above.discard(room)
        assert not known & (above | {room}), f"{room} knows rooms that stand above it"


def test_every_room_is_on_the_plan():
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == {*ROOMS, "__init__", "__main__"}


def test_no_circles():
    """No file imports one that imports it, over whatever others; what a room's ``__init__`` passes on is none."""
    arrows = {module: set(imported_modules(path)) - {module, "autobatch"} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(arrows).prepare()


PRIVATE_MODULES = ("keras.src", "tensorflow.python", "tensorflow.core", "tensorflow.tsl", "keras._tf_keras")
# Memory is known before TensorFlow starts: these say in their own docstrings which private names they touch, and why.
OF_MEMORY = {"memory/arena.py", "memory/profile_reader.py"}
NOT_OURS_TO_NAME = {"_exit", "_getframe", "_render_traceback_"}  # Python's own, and what IPython asks an exception for


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_seams_touch_what_is_private(path):
    name = path.relative_to(ROOT).as_posix()
    if path.parent.name == "seams" or name in OF_MEMORY:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            imported += [ast.unparse(argument).strip("'") for argument in node.args]
    assert not [module for module in imported if module.startswith(PRIVATE_MODULES)]
    allowed = own_private_names(tree) | NOT_OURS_TO_NAME
    touched = {
        f"{ast.unparse(node)} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and node.attr not in allowed
        and ast.unparse(node.value) not in ("self", "cls", "super()")
    }
    assert not touched, touched


def own_private_names(tree):
    """The private names that a file defines: of its functions, its classes' members and what it assigns to ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, (ast.AnnAssign, ast.Assign)):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_public_names():
    assert sorted(autobatch.__all__) == autobatch.__all__
    for name in autobatch.__all__:
        assert getattr(autobatch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'batch_size'"):
        autobatch.batch_size  # noqa: B018 - reading it is the test


def test_the_examples_use_public_names_alone():
    for path in (ROOT.parent / "examples").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        assert not list(rooms_of(path)), path
        used = {
            node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "autobatch"
        }
        assert used <= set(autobatch.__all__), path


def test_the_version_is_written_once():
    version = ROOT / "version.py"
    assert f'__version__ = "{autobatch.__version__}"' in version.read_text(encoding="utf-8")
    assert not list(rooms_of(version)), "what builds the package reads it before there is anything to import"
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
