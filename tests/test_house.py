"""The house keeps its shape: which room may know which, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import house
import pytest
from house import FILES, ROOMS, ROOT, rooms_of

import autobatch


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    assert not house.strangers_in(room)


def test_arrows_run_down():
    above = set(ROOMS)
    for room, known in ROOMS.items():
        above.discard(room)
        assert not known & (above | {room}), f"{room} knows rooms that stand above it"


def test_every_room_is_on_the_plan():
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == {*ROOMS, "__init__", "__main__"}


def test_no_circles():
    assert not house.circle()


def test_the_script_prints_what_it_found():
    done = subprocess.run([sys.executable, house.__file__], capture_output=True, text=True, check=True)
    assert done.stdout == "arrows up: 0\ncircles: 0\n"


PRIVATE_MODULES = (
    *("keras.src", "tensorflow.python", "tensorflow.core", "tensorflow.tsl", "tensorflow.compiler"),
    "keras._tf_keras",
)
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


# The same question asked of each of several modules, or the same check in the words of another caller.
ONE_FOR_EACH = {
    *("add_parser", "run", "main", "check", "render", "load", "register", "unregister"),
    *("headroom", "memory_limit", "positive_int", "seconds"),
}


def test_no_public_name_stands_for_two_things():
    homes = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(path.relative_to(ROOT).as_posix())
    twice = {name for name, files in homes.items() if len(files) > 1}
    assert twice == ONE_FOR_EACH, {name: homes[name] for name in twice ^ ONE_FOR_EACH}


NO_BEGINNING = ("What", "Whether", "How", "Where", "Which", "If", "That", "Those", "So", "As", "The same")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    """Ruff asks for verbs where it knows a function; this is about all that documents something."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [node.value.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and _is_text(node.value)]
    assert not [text.splitlines()[0] for text in texts if text.startswith(tuple(f"{word} " for word in NO_BEGINNING))]


def _is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


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
