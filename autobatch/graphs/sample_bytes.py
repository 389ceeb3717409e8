"""Estimate of what a sample adds to the peak, from the traced step alone: good to a factor of two, and free.

The graph of a forward and backward pass names every tensor that it computes. Only some are alive at once: the
activations that the backward pass waits for. Over eleven models (benchmarks/search_cost.py) these were an eighth to a
third of all bytes per sample, a fifth in the middle. That is far too rough to plan with. It is good enough to choose a
first trial that is neither too small to show anything nor too large to fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from autobatch.records import SampleEstimate

_ALIVE = 0.2
"""Share of all computed bytes that is held at the peak."""

# Nodes whose outputs are their inputs' buffers, or are there before the step.
_SHARED = ("Reshape", "Identity", "IdentityN", "StopGradient", "PreventGradient", "ExpandDims", "Squeeze")
_NOT_COMPUTED = frozenset((*_SHARED, "Placeholder", "Const", "ReadVariableOp"))
_LOOPS = frozenset(("While", "StatelessWhile"))

_CONVOLUTIONS = frozenset(("Conv2DBackpropInput", "Conv2DBackpropFilter"))
_CONVOLUTION_WORKSPACE_BYTES = 30 * 2**20
"""Bytes at most that a CPU's gradient of a convolution takes beside its tensors, whatever the batch: after
``tensorflow/core/kernels/conv_grad_input_ops.h``."""


def of_graph(graph: tf.Graph, *, on_cpu: bool = False, is_compiled: bool = False) -> SampleEstimate | None:
    """Estimate what one sample needs in the traced step ``graph``.

    ``is_compiled`` says that XLA compiles the step. A CPU's operations then run without workspaces of the allocator's.
    Return None where it has loops, and the iterations of none are known, or where no tensor has a row per sample.
    """
    definition = graph.as_graph_def(add_shapes=True)
    rows = list(_computed_rows(definition.node))
    total, largest = sum(rows), max(rows, default=0)
    loops = [operation for operation in graph.get_operations() if operation.type in _LOOPS]
    if loops:
        bodies = {function.signature.name: function.node_def for function in definition.library.function}
        counts = [_iterations(loop) for loop in loops]
        most = max((count for count in counts if count is not None), default=None)
        if most is None:
            return None
        # The loop of a gradient is given the forward loop's lists, and runs as often.
        for loop, count in zip(loops, counts, strict=True):
            total += (most if count is None else count) * sum(_computed_rows(bodies[loop.get_attr("body").name]))
    convolves = on_cpu and not is_compiled and any(node.op in _CONVOLUTIONS for node in definition.node)
    workspace = _CONVOLUTION_WORKSPACE_BYTES if convolves else 0
    return SampleEstimate(_ALIVE * total, largest, workspace, is_compiled) if total else None


def _computed_rows(nodes: Iterable[Any]) -> Iterator[int]:
    """Yield the bytes per sample of each tensor that ``nodes`` compute with a row per sample."""
    for node in nodes:
        if node.op in _NOT_COMPUTED:
            continue
        kind = next((node.attr[name].type for name in ("T", "dtype") if name in node.attr), tf.float32.as_datatype_enum)
        # A loop has a list of types, which reads as no type: 0.
        item_bytes = (tf.dtypes.as_dtype(kind).size or 0) if kind else 0
        for shape in node.attr["_output_shapes"].list.shape:
            rows, *row = [dimension.size for dimension in shape.dim] or [0]
            if rows == -1 and all(size >= 0 for size in row):
                yield item_bytes * int(tf.TensorShape(row).num_elements() or 0)


def _iterations(loop: tf.Operation) -> int | None:
    """Return how often a loop over time steps runs, from the lists of tensors that it reads and fills; else None."""
    lengths = []
    for tensor in loop.inputs:
        source = tensor.op
        if source.type == "TensorListFromTensor":
            lengths.append(source.inputs[0].shape[0] if source.inputs[0].shape.rank else None)
        elif source.type == "TensorListReserve":
            lengths.append(tf.get_static_value(source.inputs[1]))
    return max((int(length) for length in lengths if length is not None), default=None)
