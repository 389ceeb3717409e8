"""Which room of autobatch may import which: the table, and what the files really import.

``python tests/house.py`` prints the arrows that run up and the circles: there are none of either.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "autobatch"
GROUND = {"records", "allocation_trace", "errors", "units", "version", "display", "terminal", "handover", "interrupts"}
# What each room may import from, from the ground up. Lazy imports and modules named in strings count as well.
ROOMS: dict[str, set[str]] = {
    "version": set(),
    "types": set(),
    "allocation_trace": set(),
    "display": set(),
    "units": set(),
    "record_codec": set(),
    "tracebacks": set(),
    "interrupts": set(),
    "errors": {"tracebacks"},
    "arguments": {"units"},
    "handover": set(),
    "terminal": {"errors", "handover"},
    "records": {"display", "allocation_trace"},
    "training_history": {"records"},
    "seams": set(),
    "tensors": {"seams"},
    # Pure: none of these four knows TensorFlow's side of the house.
    "search": {"records", "allocation_trace", "errors", "units"},
    "report": {"records", "errors", "units", "record_codec"},
    "cache": {"records", "errors", "units"},
    "memory": {"records", "allocation_trace", "errors", "seams", "units"},
    "restart": {"handover", "memory", "units"},
    "graphs": {"records", "seams", "tensors", "tracebacks"},
    "losses": {"graphs", "seams", "tensors"},
    "averages": {"graphs", "seams", "tensors"},
    "metrics": {"graphs", "losses", "seams", "tensors"},
    "differences": {"graphs", "metrics", "seams", "tensors"},
    "step": {"averages", "differences", "errors", "graphs", "losses", "metrics", "seams", "tensors", "tracebacks"},
    "data": {*GROUND, "memory", "seams", "step", "tensors"},
    "watch": {*GROUND, "memory", "seams"},
    "recovery": {*GROUND, "memory", "metrics", "step", "tensors"},
    "backup": {*GROUND, "arguments", "data", "recovery", "seams", "tensors"},
    "trial": {*GROUND, "arguments", "differences", "graphs", "memory", "recovery", "seams", "step", "tensors"},
    "sizing": {*GROUND, "cache", "differences", "memory", "search", "trial"},
    "replicas": {*GROUND, "memory", "metrics", "recovery", "seams", "step", "tensors", "trial"},
    "train": {
        *GROUND,
        "backup",
        "data",
        "memory",
        "recovery",
        "replicas",
        "seams",
        "step",
        "tensors",
        "tracebacks",
        "training_history",
        "trial",
        "watch",
    },
    "opening": {*GROUND, "arguments", "data", "replicas", "seams", "step", "trial"},
    "worker": {*GROUND, "arguments", "memory", "opening", "record_codec", "seams", "tracebacks", "trial"},
    "remedies": {*GROUND, "memory", "seams", "trial", "worker"},
    "api": {
        *GROUND,
        *(
            "arguments",
            "backup",
            "data",
            "opening",
            "remedies",
            "replicas",
            "search",
            "seams",
            "sizing",
            "step",
            "train",
        ),
        *("tracebacks", "training_history", "trial"),
    },
    "cli": {*GROUND, "api", "arguments", "cache", "memory", "remedies", "report", "restart", "trial", "worker"},
    "notebook": {*GROUND, "api", "cli", "report", "tracebacks"},
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
NAMED = re.compile(r"(?<![\w.])autobatch(?:\.\w+)+")


@functools.cache
def imported_modules(path):
    """Every module of autobatch's that a file imports or names: at the top, within functions, and in strings.

    String constants that are statements of their own are documentation, and name none.
    """
    named, documentation = [], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # a statement comes before what it holds
        if isinstance(node, ast.Expr):
            documentation.add(id(node.value))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports by name, not by dots"
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            named += NAMED.findall(node.value)
            # Code in a string, which another process runs.
            named += [f"{room}.{name}" for room, name in re.findall(r"from (autobatch[\w.]*) import (\w+)", node.value)]
    modules = []
    for name in named:
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES:
            modules.append(name)
    return modules


def rooms_of(path):
    for module in imported_modules(path):
        if module != "autobatch":
            yield module.split(".")[1]


def strangers_in(room):
    """The rooms that a room imports from and may not, each with the file that does."""
    home = ROOT / room
    files = list(home.rglob("*.py")) if home.is_dir() else [ROOT / f"{room}.py"]
    assert files
    return sorted({(path.name, found) for path in files for found in rooms_of(path)} - known_to(room, files))


def known_to(room, files):
    return {(path.name, known) for path in files for known in ROOMS[room] | {room, "types"}}


def circle():
    """The modules of a circle: no file imports one that imports it, over whatever others; empty if there is none.

    What a room's ``__init__`` passes on is no arrow.
    """
    arrows = {module: set(imported_modules(path)) - {module, "autobatch"} for module, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def main():
    up = [(room, file, stranger) for room in ROOMS for file, stranger in strangers_in(room)]
    print(f"arrows up: {len(up)}", *(f"  {room}/{file} -> {stranger}" for room, file, stranger in up), sep="\n")
    found = circle()
    print(f"circles: {1 if found else 0}", *(f"  {module}" for module in found), sep="\n")
    return 1 if up or found else 0


if __name__ == "__main__":
    sys.exit(main())
