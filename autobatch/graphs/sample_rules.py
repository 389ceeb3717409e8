"""Rules for what each kind of TensorFlow operation makes of the samples of a batch.

A rule gets a :class:`Node`: an operation with the dependences of its inputs. It returns those of the outputs. An
operation without a rule is taken to treat each sample by itself where the shapes allow it: like the batch, its result
has a first dimension of unknown size. Operations on images are examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import tensorflow as tf

from autobatch.graphs.dependence import (
    FREE,
    Degree,
    Dependence,
    first_unknown,
    merged,
    same_degree,
    settled,
    summed,
    unknown,
)
from autobatch.types import Operation

Rule = Callable[["Node"], Any]
"""Function that returns a :class:`Dependence` for all outputs of an operation, or a list with one for each."""

RULES: dict[str, Rule] = {}


@dataclass(frozen=True, slots=True)
class Node:
    """An operation of a graph, and the dependences of its inputs."""

    op: Operation
    inputs: Sequence[Dependence]

    def rank(self, place: int) -> int | None:
        rank: int | None = self.op.inputs[place].shape.rank
        return rank

    def constant(self, place: int) -> Any:
        """Return the value of an input that is a constant; None where it is none."""
        return tf.get_static_value(self.op.inputs[place])

    def lost(self, why: str = "") -> Dependence:
        return unknown(f"{self.op.name}{f' ({why})' if why else ''}")


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(op: Operation, inputs: Sequence[Dependence]) -> list[Dependence]:
    """Return the dependence of each output of ``op``, given those of its inputs."""
    node = Node(op, inputs)
    found = RULES.get(op.type)
    if found is None:
        result = _without_a_rule(node)
    elif (lost := first_unknown(inputs)) is not None and op.type not in _WHATEVER_THE_INPUTS:
        result = lost
    else:
        result = found(node)
    return result if isinstance(result, list) else [result] * len(op.outputs)


_WHATEVER_THE_INPUTS = frozenset(["Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "CTCLoss", "CTCLossV2"])


_ACROSS_THE_BATCH = frozenset(
    [
        *("Bincount", "DenseBincount", "Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2", "ListDiff"),
        *("RandomShuffle", "DynamicPartition", "DynamicStitch", "ParallelDynamicStitch", "InvertPermutation"),
        *("SegmentMean", "SegmentMax", "SegmentMin", "SegmentProd", "UnsortedSegmentMax", "UnsortedSegmentMin"),
        *("UnsortedSegmentProd", "ScatterNd", "TensorScatterUpdate", "TensorScatterAdd", "TensorScatterSub"),
        *("TensorScatterMax", "TensorScatterMin", "SparseReorder", "HistogramFixedWidth", "NonMaxSuppressionV3"),
        *("SparseSegmentSum", "SparseSegmentMean", "SparseSegmentSqrtN", "SparseTensorDenseMatMul"),
    ]
)
"""Operations whose result may have an entry for each sample, but not that sample's own. A rule takes precedence."""


def _without_a_rule(node: Node) -> Any:
    inputs = [
        each
        for each, tensor in zip(node.inputs, node.op.inputs, strict=True)
        if tensor.dtype != tf.resource and each.entries is None  # shapes say how much there is, and not what
    ]
    if (lost := first_unknown(inputs)) is not None:
        return lost
    if not any(each.data or each.axis is not None or each.degree != 0 for each in inputs):
        return merged(replace(FREE, data=False), inputs)
    axes = {each.axis for each in inputs if each.axis is not None}
    if not axes:
        return replace(merged(FREE, inputs), degree=_zero_if_zero(inputs), linear=False)
    results = []
    for output in node.op.outputs:
        shape = output.shape
        first_is_open = shape.rank is not None and shape.rank > 0 and shape[0] is None
        first_is_open = first_is_open and node.op.type not in _ACROSS_THE_BATCH
        if axes == {0} and first_is_open:
            of_samples = next(each for each in inputs if each.axis == 0)
            results.append(settled(replace(merged(of_samples, inputs), degree=_zero_if_zero(inputs), axis=0)))
        else:
            results.append(node.lost())
    return results


def _zero_if_zero(inputs: Sequence[Dependence]) -> Degree:
    return 0 if all(each.degree == 0 for each in inputs) else None


# -- number by number ----------------------------------------------------------------------------------------------


def _aligned(node: Node, places: Sequence[int]) -> Dependence | None:
    """Return a dependence with the samples' axis after broadcasting the operands; None if their samples differ."""
    rank = max((node.rank(place) or 0) for place in places)
    found: Dependence | None = None
    for place in places:
        operand = node.inputs[place]
        if operand.axis is None:
            continue
        its_rank = node.rank(place)
        if its_rank is None:
            return None
        axis = rank - its_rank + operand.axis
        if found is None:
            found = replace(operand, axis=axis)
        elif found.axis != axis or not _alike(found, operand):
            return None
        elif operand.data and not found.data:
            found = replace(operand, axis=axis)
    return found or FREE


def _alike(one: Dependence, other: Dependence) -> bool:
    """Return True if entries in the same place are of the same sample, as far as that is known."""
    if None in (one.parts, other.parts):
        return True
    if one.scattered and other.scattered and None not in (one.pieces, other.pieces) and one.pieces != other.pieces:
        return False
    return one.parts == other.parts and (one.scattered == other.scattered or one.parts == 1)


def _elementwise(node: Node, places: Sequence[int], degree: Degree, *, adds: bool, linear: bool) -> Dependence:
    operands = [node.inputs[place] for place in places]
    if any(each.positions for each in operands):
        return node.lost("its numbers count samples")
    together = _aligned(node, places)
    if together is None:
        return node.lost("it sets samples against each other")
    result = replace(merged(together, operands), degree=degree)
    if together.axis is None:
        return replace(result, linear=linear)
    # A number of the whole batch enters every sample. Added, it does no harm to a sum over them; otherwise they mix.
    beside = [each for each in operands if each.axis is None and each.data]
    if adds:
        return replace(result, linear=all(each.linear for each in operands))
    if beside or result.added:
        return settled(replace(result, linear=True))
    return replace(result, linear=True)


def _all(node: Node) -> range:
    return range(len(node.inputs))


_LINEAR_UNARY = (
    *("Identity", "Neg", "Cast", "StopGradient", "PreventGradient", "CheckNumerics", "Snapshot", "Real", "Imag"),
    *("EnsureShape", "PlaceholderWithDefault", "CopyToDevice", "Conj", "Bitcast"),
)


@rule(*_LINEAR_UNARY)
def _linear_unary(node: Node) -> Dependence:
    result = node.inputs[0]
    if node.op.type == "Cast" and not _keeps_values(node):
        return _nonlinear(node, [0])
    return result


def _keeps_values(node: Node) -> bool:
    """Return True if a cast keeps numbers as they are: not from a fraction to a whole number, nor to a truth value."""
    before, after = node.op.inputs[0].dtype, node.op.outputs[0].dtype
    return not (before.is_floating and after.is_integer) and after != tf.bool


@rule("IdentityN")
def _identities(node: Node) -> list[Dependence]:
    return list(node.inputs)


def _nonlinear(node: Node, places: Sequence[int]) -> Dependence:
    operands = [node.inputs[place] for place in places]
    result = _elementwise(node, places, _zero_if_zero(operands), adds=False, linear=_is_free(operands))
    return settled(result) if result.axis is not None else result


def _is_free(operands: Sequence[Dependence]) -> bool:
    return not any(each.data for each in operands)


_UNARY = (
    *("Relu", "Relu6", "Elu", "Selu", "LeakyRelu", "Softplus", "Softsign", "Tanh", "Sigmoid", "Erf", "Erfc", "Erfinv"),
    *("Exp", "Expm1", "Log", "Log1p", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh"),
    *("Atanh", "Abs", "Sign", "Floor", "Ceil", "Round", "Rint", "IsNan", "IsInf", "IsFinite", "LogicalNot", "Invert"),
    *("Reciprocal", "Inv", "Square", "Sqrt", "Rsqrt", "Lgamma", "Digamma", "Ndtri", "ComplexAbs", "Angle"),
    *("StringLower", "AsString", "BesselI0e", "BesselI1e", "QuantizeAndDequantizeV2"),
)
_POWERS = {"Square": Fraction(2), "Sqrt": Fraction(1, 2), "Reciprocal": Fraction(-1), "Inv": Fraction(-1)}
_POWERS |= {"Rsqrt": Fraction(-1, 2), "Abs": Fraction(1), "Relu": Fraction(1), "LeakyRelu": Fraction(1)}


@rule(*_UNARY)
def _unary(node: Node) -> Dependence:
    result = _nonlinear(node, [0])
    degree = node.inputs[0].degree
    if degree and node.op.type in _POWERS:
        return replace(result, degree=degree * _POWERS[node.op.type])
    return result


_NARY = (
    *("Maximum", "Minimum", "Pow", "SquaredDifference", "FloorDiv", "FloorMod", "Mod", "TruncateDiv", "TruncateMod"),
    *("Atan2", "Xdivy", "Xlogy", "Xlog1py", "Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual"),
    *("LogicalAnd", "LogicalOr", "ApproximateEqual", "ClipByValue", "NextAfter", "BitwiseAnd", "BitwiseOr"),
    *("BitwiseXor", "LeftShift", "RightShift", "Igamma", "Igammac", "Zeta", "Polygamma", "Betainc", "Complex"),
    *("ReluGrad", "Relu6Grad", "EluGrad", "SeluGrad", "LeakyReluGrad", "SoftplusGrad", "SoftsignGrad", "TanhGrad"),
    *("SigmoidGrad", "SqrtGrad", "RsqrtGrad", "ReciprocalGrad", "InvGrad"),
)


@rule(*_NARY)
def _nary(node: Node) -> Dependence:
    operands = list(node.inputs)
    result = _nonlinear(node, list(_all(node)))
    if node.op.type in ("Maximum", "Minimum") and result.degree is None:
        return replace(result, degree=same_degree(operands))
    if node.op.type == "SquaredDifference" and (degree := same_degree(operands)):
        return replace(result, degree=2 * degree)
    return result


@rule("Add", "AddV2", "Sub", "AddN")
def _sum_of(node: Node) -> Dependence:
    degree = same_degree(node.inputs)
    return _elementwise(node, _all(node), degree, adds=True, linear=all(each.linear for each in node.inputs))


@rule("Select", "SelectV2")
def _chosen(node: Node) -> Dependence:
    condition, *values = node.inputs
    places = [0, 1, 2]
    # A vector of truth values chooses whole rows of a tensor of higher rank.
    if node.op.type == "Select" and node.rank(0) == 1 and condition.axis == 0 and values[0].axis in (0, None):
        places = [1, 2]
    result = _elementwise(node, places, same_degree(values), adds=False, linear=_is_free(node.inputs))
    return merged(result, [result, condition]) if not result.unknown else result


@rule("Mul", "MulNoNan")
def _product(node: Node) -> Dependence:
    one, other = node.inputs
    degree = None if one.degree is None or other.degree is None else one.degree + other.degree
    if any(each.zero for each in node.inputs):
        degree = 0
    return _scaled(node, one, other, degree, linear=(one.linear and other.linear and not (one.data and other.data)))


@rule("RealDiv", "Div", "DivNoNan")
def _quotient(node: Node) -> Dependence:
    one, other = node.inputs
    degree = None if one.degree is None or other.degree is None else one.degree - other.degree
    return _scaled(node, one, other, degree, linear=one.linear and not other.data)


def _scaled(node: Node, one: Dependence, other: Dependence, degree: Degree, *, linear: bool) -> Dependence:
    operands = [one, other]
    by_what_is_free = not (one.data and other.data)
    if one.axis is not None or other.axis is not None:
        result = _elementwise(node, [0, 1], degree, adds=by_what_is_free, linear=linear)
        # A sample divided by the sum of all samples is no sum of samples any more.
        divided = node.op.type not in ("Mul", "MulNoNan") and (other.added or not other.linear)
        return settled(result) if divided and not result.unknown else result
    return _elementwise(node, [0, 1], degree, adds=False, linear=linear and all(each.linear for each in operands))


@rule("BiasAdd")
def _bias(node: Node) -> Dependence:
    value, bias = node.inputs
    return replace(merged(value, [value, bias]), degree=same_degree([value, bias]))


@rule("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Dependence:
    value = node.inputs[0]
    rank = node.rank(0)
    if value.axis is not None and (rank is None or value.axis == rank - 1):
        return node.lost("it sets samples against each other")
    return _nonlinear(node, [0])


# -- sums and means ------------------------------------------------------------------------------------------------

_LINEAR_REDUCTIONS = ("Sum", "Mean")


@rule("Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm")
def _reduction(node: Node) -> Dependence:
    value = node.inputs[0]
    linear = node.op.type in _LINEAR_REDUCTIONS
    if node.op.type == "Prod" and value.entries is not None and not value.data:
        known = [degree for degree in value.entries if degree is not None]
        return replace(FREE, degree=sum(known) if len(known) == len(value.entries) else None)
    if value.axis is None:
        if linear or not value.data:
            return replace(value, entries=None, zero=False)
        return replace(value, linear=False, entries=None, zero=False)
    axes, rank = node.constant(1), node.rank(0)
    if axes is None or rank is None:
        return node.lost("over dimensions that are not known")
    over = {int(axis) % rank for axis in axes.reshape(-1)} if rank else set()
    if value.axis in over:
        value = value if linear else settled(value)
        if linear:
            return summed(value, node.op.name, mean=node.op.type == "Mean")
        return replace(summed(value, node.op.name, mean=True), linear=not value.data)
    kept = value if linear else settled(value)
    kept = replace(kept, entries=None, zero=False, positions=False)
    if node.op.get_attr("keep_dims"):
        return kept
    counted = value.axis or 0
    return replace(kept, axis=counted - sum(axis < counted for axis in over))


@rule("L2Loss")
def _l2(node: Node) -> Dependence:
    value = node.inputs[0]
    if value.axis is not None:
        squared = replace(settled(value), degree=None if value.degree is None else 2 * value.degree)
        return summed(squared, node.op.name, mean=False)
    degree = None if value.degree is None else 2 * value.degree
    return replace(value, degree=degree, linear=not value.data, entries=None)


@rule("BiasAddGrad")
def _bias_gradient(node: Node) -> Dependence:
    value = node.inputs[0]
    return summed(value, node.op.name, mean=False) if value.axis == 0 else node.lost()


@rule("SegmentSum", "UnsortedSegmentSum")
def _segments(node: Node) -> Dependence:
    value, ids = node.inputs[:2]
    if node.op.type == "SegmentSum" or node.inputs[2].data or node.inputs[2].degree != 0:
        return node.lost("of as many parts as the samples make")
    if value.axis is None and ids.axis is None:
        return merged(replace(value, linear=value.linear and not ids.data), [value, ids])
    if value.axis == 0 and ids.axis == 0:
        return summed(merged(value, [value, ids]), node.op.name, mean=False)
    return node.lost()
