"""Analysis of a metric's graph, to find out whether its update is a sum over the samples of a batch.

Updating such a metric with one micro-batch after another leaves the same state as one update with the whole batch.
The analysis knows a set of operations and calls everything else unknown. So it errs on one side only: an update that
it calls a sum is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from autobatch.types import Graph, Operation, Tensor

FREE, ROWS, SUM, SHAPE, READ, UNKNOWN = "free", "rows", "sum", "shape", "read", "unknown"
"""Kinds of tensors: free of data; a row for each sample, made of that sample's rows alone; a sum over such rows; the
shape of rows; the value of a variable; anything else."""

_ELEMENTWISE = frozenset(
    [
        *("Abs", "Neg", "Sign", "Square", "Sqrt", "Rsqrt", "Exp", "Expm1", "Log", "Log1p", "Sigmoid", "Tanh", "Relu"),
        *("Relu6", "Elu", "Softplus", "Erf", "Reciprocal", "Inv", "Round", "Rint", "Floor", "Ceil", "LogicalNot"),
        *("IsNan", "IsInf", "IsFinite", "ZerosLike", "OnesLike", "Sin", "Cos", "Cosh", "ClipByValue"),
        *("Bitcast", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Invert"),
        *("Add", "AddV2", "Sub", "Mul", "MulNoNan", "RealDiv", "Div", "DivNoNan", "FloorDiv", "FloorMod", "Mod"),
        *("Pow", "Maximum", "Minimum", "SquaredDifference", "Xlogy", "Xdivy", "SelectV2", "Select"),
        *("Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual", "LogicalAnd", "LogicalOr"),
    ]
)
_PASSING = frozenset(["Identity", "StopGradient", "PreventGradient", "CheckNumerics", "Cast"])
_REDUCING = frozenset(["Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "ArgMax", "ArgMin"])
_BY_LAST_AXIS = frozenset(
    ["Softmax", "LogSoftmax", "TopKV2", "SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits"]
)
_ADDING = frozenset(["Add", "AddV2", "AddN", "Sub"])
_WITHOUT_EFFECT = frozenset(["ReadVariableOp", "Placeholder", "Assert", "VarHandleOp"])
"""Operations that TensorFlow calls stateful although they change nothing."""


class Kinds:
    """Kinds of all tensors of a graph. ``rows`` are the tensors that are known to have a row for each sample."""

    def __init__(self, graph: Graph, rows: Iterable[Any]) -> None:
        self._kinds: dict[str, str] = {tensor.name: ROWS for tensor in rows}
        self._variable_of: dict[str, Any] = {}
        self._captured = {inner.name: outer for outer, inner in graph.captures}
        self._operations = graph.get_operations()
        for operation in self._operations:
            kind = self._kind_of(operation)
            for output in operation.outputs:
                self._kinds.setdefault(output.name, kind)

    def of(self, tensor: Tensor) -> str:
        """Return the kind of one of the graph's tensors, or of a number."""
        if not tf.is_tensor(tensor) or not hasattr(tensor, "graph"):
            return FREE
        return self._kinds.get(tensor.name, UNKNOWN)

    def adds_sums_alone(self) -> bool:
        """Return True if the graph writes nothing but variables, and adds a sum over rows to each of them."""
        for operation in self._operations:
            if operation.type in ("AssignAddVariableOp", "AssignSubVariableOp"):
                if self.of(operation.inputs[1]) != SUM:
                    return False
            elif operation.type == "AssignVariableOp":
                if not self._adds_to(operation.inputs[0], operation.inputs[1]):
                    return False
            elif operation.op_def.is_stateful and operation.type not in _WITHOUT_EFFECT:
                return False
        return True

    def _adds_to(self, handle: Tensor, value: Any) -> bool:
        while value.op.type == "Identity":
            value = value.op.inputs[0]
        if value.op.type not in ("Add", "AddV2", "Sub"):
            return False
        before, added = value.op.inputs
        if value.op.type != "Sub" and self.of(before) == SUM:
            before, added = added, before
        return self.of(before) == READ and self._variable_of[before.name] is handle and self.of(added) == SUM

    def _kind_of(self, operation: Operation) -> str:
        kind, inputs = operation.type, list(operation.inputs)
        if kind == "Placeholder":
            outer = self._captured.get(operation.outputs[0].name)
            return UNKNOWN if outer is None or (hasattr(outer, "graph") and outer.dtype != tf.resource) else FREE
        if kind == "ReadVariableOp":
            self._variable_of[operation.outputs[0].name] = inputs[0]
            return READ
        kinds = [self.of(each) for each in inputs]
        if UNKNOWN in kinds:
            return UNKNOWN
        if kind in ("Identity", "Cast") and kinds == [READ]:
            self._variable_of[operation.outputs[0].name] = self._variable_of[inputs[0].name]
            return READ
        if READ in kinds:
            return UNKNOWN
        if all(each == FREE for each in kinds):
            return UNKNOWN if operation.op_def.is_stateful and kind not in _WITHOUT_EFFECT else FREE
        if SUM in kinds:
            return self._made_of_sums(operation, kinds)
        if SHAPE in kinds:
            return self._made_of_shapes(operation, kinds)
        return self._made_of_rows(operation, kinds)

    @staticmethod
    def _made_of_sums(operation: Operation, kinds: list[str]) -> str:
        kind = operation.type
        if kind == "Cast":
            source, target = operation.inputs[0].dtype, operation.outputs[0].dtype
            return SUM if target.is_floating or (source.is_integer and target.is_integer) else UNKNOWN
        linear = (
            kind in _PASSING
            or kind == "Neg"
            or (kind in _ADDING and set(kinds) == {SUM})
            or (kind in ("Mul", "MulNoNan") and kinds.count(SUM) == 1 and kinds.count(FREE) == 1)
            or (kind in ("RealDiv", "Div", "DivNoNan") and kinds == [SUM, FREE])
            or (kind in ("Sum", "Reshape", "Squeeze", "ExpandDims") and kinds[0] == SUM and kinds[1:] in ([], [FREE]))
        )
        return SUM if linear else UNKNOWN

    @staticmethod
    def _made_of_shapes(operation: Operation, kinds: list[str]) -> str:
        kind, inputs = operation.type, operation.inputs
        if kind in ("Identity", "Cast"):
            return SHAPE
        if kind == "BroadcastTo" and kinds == [ROWS, SHAPE]:
            return ROWS if inputs[0].shape.rank == operation.outputs[0].shape.rank else UNKNOWN
        if (
            kind == "StridedSlice"
            and kinds == [SHAPE, FREE, FREE, FREE]
            and operation.get_attr("shrink_axis_mask") == 1
        ):
            return SUM if tf.get_static_value(inputs[1]).tolist() == [0] else UNKNOWN
        return SUM if kind == "Prod" and kinds == [SHAPE, FREE] else UNKNOWN

    @staticmethod
    def _made_of_rows(operation: Operation, kinds: list[str]) -> str:
        kind, inputs = operation.type, list(operation.inputs)
        rows = [each for each, its_kind in zip(inputs, kinds, strict=True) if its_kind == ROWS]
        ranks = {each.shape.rank for each in rows}
        if None in ranks or 0 in ranks:
            return UNKNOWN
        rank = max(ranks)
        first_is_rows = kinds[0] == ROWS and kinds.count(ROWS) == 1
        if kind in _PASSING:
            return ROWS
        if kind in _ELEMENTWISE:
            frees = [each.shape for each, its_kind in zip(inputs, kinds, strict=True) if its_kind == FREE]
            of_rows = ranks == {operation.outputs[0].shape.rank}
            return ROWS if of_rows and all(_spreads_over_rows(shape, rank) for shape in frees) else UNKNOWN
        if kind == "Shape":
            return SHAPE
        if kind == "Size":
            return SUM
        if kind in _BY_LAST_AXIS:
            return ROWS if inputs[0].shape.rank >= 2 else UNKNOWN
        if kind in _REDUCING and first_is_rows:
            axes = _axes(inputs[1], rank)
            if axes is None or 0 not in axes:
                return UNKNOWN if axes is None else ROWS
            return SUM if kind == "Sum" else UNKNOWN
        if kind in ("MatMul", "BatchMatMulV2"):
            return _of_product(operation, kinds)
        if kind in ("UnsortedSegmentSum", "ScatterNd") and kinds == [ROWS, ROWS, FREE]:
            return SUM
        moved = _keeps_rows(operation, first_is_rows, rank) or (
            kind in ("ConcatV2", "Pack") and _joins_rows(operation, kinds)
        )
        return ROWS if moved else UNKNOWN


def _spreads_over_rows(shape: Any, rank: int) -> bool:
    return shape.rank is not None and (shape.rank < rank or (shape.rank == rank and shape[0] == 1))


def _axes(tensor: Tensor, rank: int) -> list[int] | None:
    value = tf.get_static_value(tensor)
    return None if value is None else [int(axis) % rank for axis in value.ravel()]


def _of_product(operation: Operation, kinds: list[str]) -> str:
    if operation.type != "MatMul":
        return UNKNOWN
    transposed = operation.get_attr("transpose_a"), operation.get_attr("transpose_b")
    if kinds == [ROWS, FREE] and not transposed[0]:
        return ROWS
    return SUM if kinds == [ROWS, ROWS] and transposed == (True, False) else UNKNOWN


def _keeps_rows(operation: Operation, first_is_rows: bool, rank: int) -> bool:
    """Return True if an operation moves or picks elements within each row, and leaves the order of the rows."""
    kind, inputs = operation.type, list(operation.inputs)
    if kind == "GatherV2" and not first_is_rows:  # a table of constants, and what to look up in it
        on_first = tf.get_static_value(inputs[2]) == 0 and not operation.get_attr("batch_dims")
        return bool(inputs[0].op.type == "Const" and on_first)
    if kind == "OneHot":
        return first_is_rows and operation.get_attr("axis") != 0
    if not first_is_rows:
        return False
    if kind == "Reshape":
        return _reshapes_rows(inputs[0].shape, tf.get_static_value(inputs[1]))
    if kind == "Squeeze":
        axes = [axis % rank for axis in operation.get_attr("squeeze_dims")]
        return bool(axes) and 0 not in axes
    if kind == "ExpandDims":
        return 0 not in (_axes(inputs[1], rank + 1) or [0])
    if kind == "Transpose":
        order = tf.get_static_value(inputs[1])
        return order is not None and order[0] == 0
    if kind == "GatherV2":
        return 0 not in (_axes(inputs[2], rank) or [0])
    if kind == "StridedSlice":
        steps = tf.get_static_value(inputs[3])
        if steps is None or operation.get_attr("new_axis_mask"):
            return False
        whole = operation.get_attr("begin_mask") & operation.get_attr("end_mask") & 1 and steps[0] == 1
        rest_is_sliced = operation.get_attr("ellipsis_mask") & 1 and len(steps) - 1 < rank
        return bool(rest_is_sliced or (whole and not operation.get_attr("shrink_axis_mask") & 1))
    return False


def _reshapes_rows(shape: Any, target: Any) -> bool:
    if target is None or len(target) == 0 or target[0] != -1:
        return False
    if len(target) == 1:
        return True
    return bool(shape[1:].is_fully_defined() and math.prod(shape[1:]) % math.prod(target[1:].tolist()) == 0)


def _joins_rows(operation: Operation, kinds: Sequence[str]) -> bool:
    """Return True if rows are joined beside each other, so that there are no more rows than before."""
    if operation.type == "Pack":
        return set(kinds) == {ROWS} and operation.get_attr("axis") != 0
    rank = operation.inputs[0].shape.rank
    return set(kinds[:-1]) == {ROWS} and 0 not in (_axes(operation.inputs[-1], rank) or [0])
