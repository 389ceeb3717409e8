"""Rows of a batch that a traced step takes by their numbers, so that a part of the batch does not stand for itself.

Two kinds are looked for. Code may take several rows of a part by constant numbers, and nothing else of it: its first
dimension counts no samples then, as where an element stacks anchors and positives. Or it may take rows by numbers that
another part of the batch holds, as the edges of a graph number its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.graphs.sample_flow import SampleFlow
from autobatch.tracebacks import is_library, is_own
from autobatch.types import Graph, Operation, Tensor

_PASSED_ON = ("Identity", "Cast", "Reshape", "Squeeze", "StopGradient")
"""Operations that change no row's place, where a part is taken row by row."""

_OF_NUMBERS = (
    *_PASSED_ON,
    *("StridedSlice", "Slice", "ExpandDims", "Unpack", "Split", "SplitV", "Transpose", "SelectV2", "Select", "Less"),
    *(
        "LessEqual",
        "GreaterEqual",
        "Greater",
        "AddV2",
        "Add",
        "Sub",
        "Maximum",
        "Minimum",
        "GatherV2",
        "ConcatV2",
        "Pack",
    ),
)
"""Operations through which a row's number may pass, from the part that holds it to where it is used."""

_SIZES = ("Shape", "Size", "Const", "Rank")


def taken_by_number(graph: Graph, specs: Sequence[Any]) -> str:
    """Return the user's line that takes rows of a batch by their number, and how it does; an empty string if none does.

    ``specs`` describe the batch: the graph's first arguments.
    """
    if any(not isinstance(spec, tf.TensorSpec) for spec in specs):
        return ""  # a ragged or sparse part has several tensors
    leaves = list(graph.inputs[: len(specs)])
    if [(leaf.dtype, str(leaf.shape)) for leaf in leaves] != [(spec.dtype, str(spec.shape)) for spec in specs]:
        return ""  # a function of something else
    for leaf in leaves:
        operation = _row_by_row(leaf)
        if operation is not None:
            return f"{_line_of(operation)} takes single rows of a part of the batch, which are no samples"
    flow: SampleFlow | None = None
    for operation in graph.get_operations():
        if operation.type not in ("GatherV2", "GatherNd") or not _holds_numbers(operation.inputs[1], leaves):
            continue
        flow = flow or SampleFlow.of_leaves(leaves, graph.inputs[len(specs) :])
        axis = flow.of(operation.inputs[0]).axis
        if axis is not None and axis == _axis_of(operation):
            return f"{_line_of(operation)} takes rows of the batch by numbers that the batch itself holds"
    return ""


def _axis_of(operation: Operation) -> int | None:
    if operation.type == "GatherNd":
        return 0
    axis = tf.get_static_value(operation.inputs[2])
    return None if axis is None or operation.get_attr("batch_dims") else int(axis)


def _row_by_row(leaf: Tensor) -> Operation | None:
    """Return the first operation that takes a row of ``leaf``, if several rows are taken and nothing else is done.

    One row alone may stand for all, as where a number is repeated for each sample.
    """
    rows: dict[int, Any] = {}
    pending = [leaf]
    while pending:
        tensor = pending.pop()
        for consumer in tensor.consumers():
            if consumer.type in _SIZES:
                continue
            if consumer.type in ("Identity", "Cast", "StopGradient"):
                pending.append(consumer.outputs[0])
                continue
            row = _row_taken(consumer, tensor)
            if row is None:
                return None
            rows.setdefault(row, consumer)
    return next(iter(rows.values())) if len(rows) > 1 else None


def _row_taken(operation: Operation, tensor: Tensor) -> int | None:
    """Return the constant number of the one row that an operation takes of a tensor; None if it does anything else."""
    if operation.type != "StridedSlice" or operation.inputs[0] is not tensor:
        return None
    begin = tf.get_static_value(operation.inputs[1])
    masks = [operation.get_attr(f"{name}_mask") for name in ("ellipsis", "new_axis")]
    takes_one = bool(operation.get_attr("shrink_axis_mask") & 1)
    return int(begin[0]) if begin is not None and takes_one and not any(mask & 1 for mask in masks) else None


def _holds_numbers(indices: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return True if these numbers are a part of the batch, moved about at the most."""
    parts = {leaf.name for leaf in leaves}
    pending, seen, found = [indices], set(), False
    while pending:
        tensor = pending.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if tensor.name in parts:
            if not tensor.dtype.is_integer:
                return False
            found = True
        elif tensor.op.type in _OF_NUMBERS:
            pending += list(tensor.op.inputs)
        elif tensor.op.type not in _SIZES:
            return False
    return found


def _line_of(operation: Operation) -> str:
    """Return the line of the user's code that has made an operation, as ``"train.py", line 12``; or its name."""
    frames = [frame for frame in operation.traceback if not is_own(frame.filename) and not is_library(frame.filename)]
    if not frames:
        return str(operation.name)
    return f'"{frames[-1].filename}", line {frames[-1].lineno}'
