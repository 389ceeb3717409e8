"""Makeup of a traced graph's tensor: what it is linear in, what follows from it, and where samples are put together.

This module knows no optimizer, loss or model. :mod:`autobatch.differences.trace_findings` and
:mod:`autobatch.differences.rules` draw the conclusions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import tensorflow as tf

from autobatch.types import Graph, Operation, Tensor

_LINEAR = frozenset(
    [
        *("Identity", "IdentityN", "Cast", "StopGradient", "PreventGradient", "CheckNumerics", "Neg"),
        *("Add", "AddV2", "AddN", "Sub", "Sum", "Mean", "UnsortedSegmentSum"),
        *("Pack", "Unpack", "ConcatV2", "Split", "SplitV", "Slice", "StridedSlice", "GatherV2", "Tile", "BroadcastTo"),
        *("Reshape", "Squeeze", "ExpandDims", "Transpose"),
    ]
)
"""Operations whose result is linear in each of their inputs that is no shape, axis or index."""

_EMPTY_OF_DATA = frozenset(["Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "Range"])
"""Operations whose result holds no content of their inputs. A range may be as long as a batch's longest sample."""

_SAME_INDICES = {
    **dict.fromkeys(["Identity", "Cast", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Slice", "StridedSlice"], 0),
    "SelectV2": 2,
}
"""Operations whose elements are among those of one input, none of them twice, and the place of that input."""

_PRODUCTS = frozenset(["Mul", "MatMul", "BatchMatMulV2", "MulNoNan"])
_QUOTIENTS = frozenset(["RealDiv", "Div", "DivNoNan"])


def not_linear_in(result: Any, known: Iterable[Any], is_other: Callable[[Any], bool]) -> Any:
    """Return an operation through which ``result`` depends on ``known`` other than linearly; None if there is none.

    ``is_other`` returns True for a tensor that depends on nothing that matters. Such factors and terms may be anything.
    """
    ends = {id(tensor) for tensor in known}
    pending, seen = [result], set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in ends or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if is_other(tensor):
            continue
        operation = tensor.op
        factors = [each for each in operation.inputs if not is_other(each)]
        if (
            operation.type in _LINEAR
            or (operation.type in _PRODUCTS and len(factors) == 1)
            or (operation.type in _QUOTIENTS and all(each is not operation.inputs[1] for each in factors))
        ):
            pending += factors
        else:
            return operation
    return None


def what_follows(tensors: Iterable[Tensor], *, but_for: Collection[str] = ()) -> set[int]:
    """Return the ids of these tensors and of all that is made of them, but for operations of the types ``but_for``."""
    pending = list(tensors)
    found: set[int] = set()
    while pending:
        tensor = pending.pop()
        if id(tensor) not in found:
            found.add(id(tensor))
            made_of_it = (operation for operation in tensor.consumers() if operation.type not in but_for)
            pending += [output for operation in made_of_it for output in operation.outputs]
    return found


def comparing_operation(result: Any) -> Any:
    """Return an operation on the way to ``result`` that puts samples of a batch together; None if none is seen.

    Products of two matrices are seen if both are made of data: similarities of all with all, correlations over the
    batch. So is whatever takes a batch along its first dimension and, broadcast, along its second. The batch's size is
    unknown in the graph. Functions, branches and loops within it are not looked into.
    """
    captured = _captured_by(result.graph)
    made = (output for operation in result.graph.get_operations() for output in operation.outputs)
    data = what_follows((each for each in made if _is_argument(each, captured)), but_for=_EMPTY_OF_DATA)
    pending, seen = [result], set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or id(tensor) not in data:
            continue
        seen.add(id(tensor))
        operands = [each for each in tensor.op.inputs if id(each) in data]
        if len(operands) == 2 and _puts_samples_together(tensor.op, *operands):
            return tensor.op
        pending += operands
    return None


def _puts_samples_together(operation: Operation, one: Any, other: Any) -> bool:
    if operation.type == "MatMul":
        return not _is_a_weighted_sum(operation, one, other)
    if operation.type == "Einsum":
        terms = operation.get_attr("equation").decode().split("->")[0].split(",")
        return "." not in "".join(terms) and (terms[0][:1] not in terms[1] or terms[1][:1] not in terms[0])
    shapes = [each.shape.as_list()[:2] if each.shape.rank is not None else [] for each in (one, other)]
    return sorted(shapes, key=repr) == [[1, None], [None, 1]] and one.shape.rank == other.shape.rank


def _is_a_weighted_sum(operation: Operation, one: Any, other: Any) -> bool:
    """Return True if a product of matrices is a weighted sum over samples, as in a masked mean by ``tf.tensordot``."""
    rows, inner = _shape_of(one, operation.get_attr("transpose_a"))
    inner_too, columns = _shape_of(other, operation.get_attr("transpose_b"))
    if inner is None and inner_too is None and 1 in (rows, columns):
        return rows is not None and columns is not None
    vectors = [each for each in (_unshaped(one), _unshaped(other)) if each.shape.as_list() == [None]]
    ranks = sorted(_unshaped(each).shape.rank for each in (one, other))
    results = [each.outputs[0].shape.rank for each in operation.outputs[0].consumers() if each.type == "Reshape"]
    return bool(vectors) and bool(results) and all(rank == ranks[1] - 1 for rank in results)


def _shape_of(matrix: Any, is_transposed: bool) -> tuple[int | None, int | None]:
    rows, columns = matrix.shape.as_list()
    return (columns, rows) if is_transposed else (rows, columns)


def _unshaped(tensor: Tensor) -> Any:
    """Return a tensor as it was before it was reshaped and transposed, as far back as its rank is known."""
    while tensor.op.type in ("Reshape", "Transpose") and tensor.op.inputs[0].shape.rank is not None:
        tensor = tensor.op.inputs[0]
    return tensor


def are_distinct(indices: Any) -> bool:
    """Return True if certainly no index in a tensor of indices occurs twice: they are a range, or constants."""
    while indices.op.type in _SAME_INDICES:
        at = _SAME_INDICES[indices.op.type]
        # Keras counts a negative index from the end.
        if indices.op.type == "SelectV2" and indices.op.inputs[0].op.type != "Less":
            return False
        indices = indices.op.inputs[at]
    if indices.op.type == "Range":
        start, _, delta = map(tf.get_static_value, indices.op.inputs)
        return start is not None and delta is not None and bool(start >= 0 and delta > 0)
    value = tf.get_static_value(indices)
    return value is not None and bool((value >= 0).all()) and len(set(value.flat)) == value.size


def depends_on_arguments(tensor: Tensor, known: dict[Any, bool]) -> bool:
    """Return True if a tensor depends on its function's arguments, and not on variables and constants alone.

    ``known`` keeps what was found, for further tensors of the same graph.
    """
    captured = _captured_by(tensor.graph)
    pending, seen = [tensor], set()
    while pending:
        each = pending.pop()
        if each.ref() in seen or known.get(each.ref()) is False:
            continue
        seen.add(each.ref())
        if known.get(each.ref()) or _is_argument(each, captured):
            known[tensor.ref()] = True
            return True
        pending += each.op.inputs
    known.update(dict.fromkeys(seen, False))
    return False


def _captured_by(graph: Graph) -> dict[int, Any]:
    """Return what a function's captured tensors stand for outside of it, by their ids."""
    return {id(inner): outer for outer, inner in graph.captures}


def _is_argument(tensor: Tensor, captured: Mapping[int, Any]) -> bool:
    """Return True for a function's argument, or a tensor of the graph around it, which may depend on that graph's."""
    if tensor.op.type != "Placeholder" or tensor.dtype == tf.resource:
        return False
    return id(tensor) not in captured or hasattr(captured[id(tensor)], "graph")
