"""Origins of a traced value: the results of metrics that it was computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autobatch.seams import graph_functions
from autobatch.types import Tensor


def origins(tensor: Tensor, batch: Sequence[Tensor], results: Sequence[Any]) -> tuple[bool, bool]:
    """Return a pair: True if ``tensor`` is computed from one of ``batch``; True if it is from one of ``results``."""
    origins = _computed_from(tensor, batch, results)
    return bool(origins - {_RESULT}), _RESULT in origins


_RESULT = -1


def _computed_from(tensor: Tensor, sources: Sequence[Any], results: Sequence[Any]) -> set[int]:
    """Return the places of the ``sources`` of ``tensor``, with ``_RESULT`` if it is computed from one of ``results``.

    What was computed on the way to a result does not count.
    """
    place_of = {source.name: place for place, source in enumerate(sources)}
    here = {result.name for result in results if getattr(result, "graph", None) is tensor.graph}
    found: set[int] = set()
    seen: set[str] = set()
    pending = [tensor]
    while pending:
        current = pending.pop()
        if current.name in seen:
            continue
        seen.add(current.name)
        if current.name in here:
            found.add(_RESULT)
        elif current.name in place_of:
            found.add(place_of[current.name])
        else:
            pending += _inputs_of(current, results, found)
    return found


def _inputs_of(tensor: Tensor, results: Sequence[Any], found: set[int]) -> list[Any]:
    operation = tensor.op
    graph = graph_functions.called_graph(operation)
    if graph is None or len(graph.outputs) != len(operation.outputs):
        return list(operation.inputs)
    places = _computed_from(graph.outputs[tensor.value_index], graph.inputs, results)
    if _RESULT in places:
        found.add(_RESULT)
    return [operation.inputs[place] for place in places - {_RESULT}]
