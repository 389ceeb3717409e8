"""Copies of small parts of a graph with other inputs, and derivatives of such parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.types import Tensor, Variable


def copied(result: Any, ends: Sequence[Any], values: Sequence[Any]) -> Any:
    """Return ``result`` as it would be if the tensors ``ends``, from which it is computed, were ``values``.

    The operations between the two are made again. What depends on none of ``ends`` is used as it is.
    """
    made = {end.name: value for end, value in zip(ends, values, strict=True)}
    order: list[Any] = []
    pending = [(result, False)]
    seen: set[str] = set()
    while pending:
        tensor, is_done = pending.pop()
        if is_done:
            order.append(tensor.op)
        elif tensor.name not in made and tensor.op.name not in seen:
            seen.add(tensor.op.name)
            pending.append((tensor, True))
            pending += [(each, False) for each in tensor.op.inputs]
    for op in order:
        if not any(each.name in made for each in op.inputs):
            continue
        again = op.graph.create_op(
            op.type,
            [made.get(each.name, each) for each in op.inputs],
            [output.dtype for output in op.outputs],
            attrs=dict(op.node_def.attr),
            name=f"{op.name.rpartition('/')[2]}_again",
        )
        for output, new in zip(op.outputs, again.outputs, strict=True):
            new.set_shape(output.shape)
            made.setdefault(output.name, new)
    return made.get(result.name, result)


def gradients_of(result: Any, sources: Sequence[Any], above: Any) -> list[Tensor]:
    """Return the derivative of ``result`` for each source; None for a source on which it does not depend."""
    if not sources:
        return []
    found: list[Any] = tf.gradients(result, list(sources), grad_ys=None if above is None else [above])
    return [None if each is None else tf.convert_to_tensor(each) for each in found]


def sources_of(tensors: Sequence[Tensor], candidates: Sequence[Variable]) -> set[int]:
    """Return the places of those candidates from which any of the tensors is computed."""
    place_of = {candidate.name: place for place, candidate in enumerate(candidates)}
    found: set[int] = set()
    seen: set[str] = set()
    pending = [tensor for tensor in tensors if tensor is not None]
    while pending:
        tensor = pending.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if tensor.name in place_of:
            found.add(place_of[tensor.name])
        else:
            pending += tensor.op.inputs
    return found
