"""Check of a TARGET before anything runs, by its text and its file alone, so that a mistake is reported at once.

The worker decides in the end: it alone imports the user's code.
"""

from __future__ import annotations

import ast
import difflib
import os
import re

from autobatch.arguments import require_backend
from autobatch.errors import TargetError

FORMS = "file.py:function, package.module:function, keras:ResNet50 or model.keras"
KERAS_FILES = (".keras", ".h5")


def check(target: str) -> None:
    """Raise ``TargetError`` if ``target`` cannot be right."""
    if target.endswith(KERAS_FILES):
        _require_file(target)
        return
    place, colon, name = target.rpartition(":")
    if not colon or not place:
        raise TargetError(f"TARGET is written as {FORMS}. Received: {target!r}")
    if not name.isidentifier():
        raise TargetError(f"After the colon of TARGET stands the name of a function. Received: {target!r}")
    if place == "keras":
        return
    if place.endswith(".py") or os.sep in place:
        _check_file(place, name)
    elif not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place):
        raise TargetError(f"{place!r} is neither a Python file nor a module. TARGET is written as {FORMS}.")


def check_backend(target: str) -> None:
    """Refuse a backend of Keras that the worker would import in vain; a function may choose another one itself."""
    if target.endswith(KERAS_FILES) or target.startswith("keras:"):
        try:
            require_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")
        except ValueError as error:
            raise TargetError(str(error)) from None


def _require_file(path: str, kind: str = "Keras") -> None:
    if not os.path.isfile(path):
        what = f"is a folder, not a {kind} file" if os.path.isdir(path) else "does not exist"
        raise TargetError(f"The file {path!r} {what}.")


def _check_file(path: str, name: str) -> None:
    _require_file(path, "Python")
    if not path.endswith(".py"):
        raise TargetError(f"The file {path!r} is no Python file: its name does not end in .py.")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise TargetError(f"The file {path!r} cannot be read: {error.strerror}.") from error
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the user's own error: the worker shows it as Python does
    names = _top_level_names(tree)
    if names is not None and name not in names:
        close = difflib.get_close_matches(name, sorted(names), 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TargetError(f"{path} has no function {name!r}.{hint}")


def _top_level_names(tree: ast.Module) -> set[str] | None:
    """Return every name that the module may bind; None where only running it shows them."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            # A function may bind a global; one called __getattr__ answers for any name.
            if any(isinstance(inner, ast.Global) for inner in ast.walk(node)) or node.name == "__getattr__":
                return None
            continue
        if isinstance(node, ast.Name) and node.id in ("exec", "globals", "setattr", "vars", "locals", "sys"):
            return None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if any(alias.name == "*" for alias in node.names):
                return None
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return names
