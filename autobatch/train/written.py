"""Which variables a traced function may change, told from its graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_READS = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"})
"""Operations that leave the variable that they are given as it is."""

_BODIES = {
    "If": (("then_branch", 1), ("else_branch", 1)),
    "StatelessIf": (("then_branch", 1), ("else_branch", 1)),
    "PartitionedCall": (("f", 0),),
    "StatefulPartitionedCall": (("f", 0),),
    "While": (("cond", 0), ("body", 0)),
    "StatelessWhile": (("cond", 0), ("body", 0)),
}
"""Of operations that run functions, the functions, and which of the operation's inputs is their first argument."""


def written_in(graph: Any) -> list[Any]:
    """The variables of which ``graph``, or a function that it calls, does more than read them."""
    variables = {id(variable.handle): variable for variable in graph.variables}
    handles = [(internal.op.name, external) for external, internal in graph.captures if id(external) in variables]
    definition = graph.as_graph_def()
    bodies = {function.signature.name: function for function in definition.library.function}
    written = _written(definition.node, {name for name, _ in handles}, bodies)
    return [variables[id(external)] for name, external in handles if name in written]


def _written(nodes: Iterable[Any], handles: set[str], bodies: Mapping[str, Any]) -> set[str]:
    """Those of ``handles``, names of nodes or of arguments, that are written through."""
    names = {handle: handle for handle in handles}
    found: set[str] = set()
    for node in nodes:
        inputs = [name.split(":")[0] for name in node.input if not name.startswith("^")]
        if node.op == "Identity" and inputs[0] in names:
            names[node.name] = names[inputs[0]]
        used = {index: names[name] for index, name in enumerate(inputs) if name in names}
        if used and node.op != "Identity" and node.op not in _READS:
            found |= set(_of_operation(node, used, bodies))
    return found


def _of_operation(node: Any, used: Mapping[int, str], bodies: Mapping[str, Any]) -> Iterator[str]:
    known = [(bodies.get(node.attr[name].func.name), first) for name, first in _BODIES.get(node.op, ())]
    if not known or any(body is None for body, _ in known):
        yield from used.values()
        return
    for body, first in known:
        assert body is not None
        arguments = [argument.name for argument in body.signature.input_arg]
        passed = {arguments[index - first]: handle for index, handle in used.items() if index >= first}
        yield from (passed[name] for name in _written(body.node_def, set(passed), bodies))
