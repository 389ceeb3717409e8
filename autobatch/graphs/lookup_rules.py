"""Rules for what lookups, draws, normalisations and lists make of the samples of a batch. See ``sample_rules``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from autobatch.graphs.dependence import FREE, Dependence, joined, merged, settled
from autobatch.graphs.sample_rules import Node, rule
from autobatch.graphs.shape_rules import made_in_shape, vector


@rule(
    *("RandomUniform", "RandomStandardNormal", "RandomUniformInt", "TruncatedNormal", "ParameterizedTruncatedNormal"),
    *("StatelessRandomUniformV2", "StatelessRandomNormalV2", "StatelessTruncatedNormalV2"),
    *("StatelessRandomUniformIntV2", "StatelessRandomUniformFullIntV2", "StatelessRandomUniform"),
    *("StatelessRandomNormal", "StatelessTruncatedNormal", "StatelessRandomUniformInt"),
)
def _draw(node: Node) -> Dependence:
    drawn = made_in_shape(node, 0, FREE)
    # One draw for all samples is like a constant of the step.
    return replace(drawn, data=True) if drawn.axis is not None else drawn


@rule("ArgMax", "ArgMin")
def _position_of_most(node: Node) -> Dependence:
    value, axis, rank = node.inputs[0], node.constant(1), node.rank(0)
    if value.axis is None:
        return replace(value, degree=0, linear=not value.data, entries=None)
    if axis is None or rank is None or int(axis) % rank == value.axis:
        return node.lost("it sets samples against each other")
    return replace(settled(value), degree=0, axis=value.axis - (int(axis) % rank < value.axis))


@rule("TopKV2", "TopK")
def _top(node: Node) -> Dependence:
    value, rank = node.inputs[0], node.rank(0)
    if value.axis is None:
        return replace(value, linear=not value.data, entries=None)
    return (
        settled(value)
        if rank is not None and value.axis < rank - 1
        else node.lost("it sets samples against each other")
    )


@rule("OneHot")
def _one_hot(node: Node) -> Dependence:
    value = node.inputs[0]
    result = merged(replace(FREE, axis=value.axis, parts=value.parts, linear=not value.data), node.inputs)
    if value.axis is None:
        return result
    rank, axis = node.rank(0), node.op.get_attr("axis")
    if rank is None:
        return node.lost("of unknown rank")
    where = rank if axis == -1 else axis
    return replace(result, axis=value.axis + (where <= value.axis), linear=True)


@rule("GatherV2", "Gather", "ResourceGather")
def _gather(node: Node) -> Dependence:
    table, indices = node.inputs[:2]
    if node.op.type == "ResourceGather":
        table = replace(FREE, weights=True)
    batch_dims = node.op.get_attr("batch_dims") if node.op.type != "Gather" else 0
    axis = node.constant(2) if node.op.type == "GatherV2" else batch_dims
    ranks = node.rank(0) if node.op.type != "ResourceGather" else None, node.rank(1)
    if table.entries is not None and indices.axis is None and (chosen := node.constant(1)) is not None:
        taken = [table.entries[int(place)] for place in np.asarray(chosen).reshape(-1)]
        return vector(taken) if ranks[1] else replace(FREE, degree=taken[0], entries=(taken[0],))
    if table.axis is None and indices.axis is None:
        return replace(merged(FREE, [table, indices]), degree=table.degree, linear=table.linear and not indices.data)
    if axis is None or ranks[1] is None:
        return node.lost("along a dimension that is not known")
    where = int(axis) if int(axis) >= 0 or ranks[0] is None else int(axis) + ranks[0]
    result = replace(merged(indices if indices.axis is not None else table, [table, indices]), degree=table.degree)
    if table.axis is None and indices.axis is not None:
        beside = settled(replace(result, added=result.added | table.added)) if table.data else result
        return replace(beside, axis=where + indices.axis - batch_dims, linear=True)
    assert table.axis is not None
    if indices.axis is None and table.axis != where:
        return replace(result, axis=table.axis + (ranks[1] - batch_dims - 1 if table.axis > where else 0))
    if table.axis == indices.axis and table.axis < batch_dims:
        return settled(replace(result, linear=True))
    if table.axis == where == 0 and indices.positions and batch_dims == 0:
        return replace(merged(table, [table]), degree=table.degree)  # each sample by its own number
    if table.axis == where and indices.selected and indices.axis is not None:
        return replace(result, axis=where + indices.axis, selected=True, parts=None, linear=True)
    return node.lost("it takes samples by their number")


@rule("GatherNd")
def _gather_nd(node: Node) -> Dependence:
    table, indices = node.inputs
    if table.axis is None and indices.axis is None:
        return merged(replace(FREE, degree=table.degree, linear=not indices.data), [table, indices])
    if table.axis is None and indices.axis == 0:
        return settled(replace(merged(indices, [table, indices]), degree=table.degree)) if table.data else indices
    if table.axis == 0 and indices.positions and indices.axis == 0:
        return settled(replace(merged(table, [table, indices]), degree=table.degree))
    if table.axis == 0 and indices.selected:
        return replace(merged(table, [table, indices]), degree=table.degree, selected=True, parts=None)
    return node.lost("it takes samples by their number")


@rule("Where")
def _where(node: Node) -> Dependence:
    value = node.inputs[0]
    if value.axis is None:
        return replace(value, linear=not value.data, entries=None)
    if value.axis != 0:
        return node.lost("of samples in another dimension than the first")
    return replace(settled(value), selected=True, parts=None, degree=0)


@rule("DynamicPartition")
def _partitioned(node: Node) -> Dependence:
    value, parts = node.inputs
    if value.axis is None and parts.axis is None:
        return replace(merged(FREE, node.inputs), linear=not value.data and not parts.data)
    if value.axis != 0 or parts.axis != 0:
        return node.lost()
    return replace(merged(value, node.inputs), degree=value.degree, selected=True, parts=None)


@rule(
    *("Svd", "Qr", "SelfAdjointEigV2", "Eig", "MatrixInverse", "Cholesky", "MatrixDeterminant", "LogMatrixDeterminant"),
    *("MatrixSolve", "MatrixTriangularSolve", "Lu", "MatrixSquareRoot", "MatrixExponential", "MatrixLogarithm"),
    *("MatrixDiagPartV3", "MatrixSetDiagV3", "MatrixBandPart", "FFT2D", "IFFT2D", "RFFT2D", "IRFFT2D"),
    *("MatrixSolveLs", "CholeskyGrad"),
)
def _on_matrices(node: Node) -> Any:
    """Take the last two dimensions together: samples are apart from each other only in dimensions before them."""
    inputs = [each for each in node.inputs if each.axis is not None]
    if not inputs:
        result = merged(FREE, node.inputs)
        return replace(
            result, degree=0 if all(each.degree == 0 for each in node.inputs) else None, linear=not result.data
        )
    apart = [
        each.axis < rank - 2
        for place, each in enumerate(node.inputs)
        if each.axis is not None and (rank := node.rank(place)) is not None
    ]
    if len(apart) < len(inputs) or not all(apart) or {each.axis for each in inputs} != {0}:
        return node.lost("it sets samples against each other")
    result = settled(replace(merged(inputs[0], node.inputs), linear=True))
    return replace(result, degree=0 if all(each.degree == 0 for each in node.inputs) else None)


@rule("FusedBatchNormV3", "FusedBatchNormV2", "FusedBatchNorm")
def _normalised(node: Node) -> list[Dependence]:
    value = node.inputs[0]
    outputs = len(node.op.outputs)
    if not node.op.get_attr("is_training"):
        return [merged(value, node.inputs)] + [FREE] * (outputs - 1)
    mixed = replace(merged(value, node.inputs), mixed=value.mixed | {node.op.name}, linear=True)
    moments = replace(merged(FREE, node.inputs), linear=False, added=frozenset({node.op.name}))
    return [mixed] + [moments] * (outputs - 1)


@rule("CTCLoss", "CTCLossV2")
def _ctc(node: Node) -> list[Dependence]:
    value = node.inputs[0]
    of_samples = settled(replace(merged(FREE, [value]), axis=0, degree=0))
    return [of_samples, replace(of_samples, axis=1)]


@rule("RaggedTensorToTensor")
def _dense(node: Node) -> Dependence:
    return replace(merged(FREE, node.inputs), axis=0, linear=True)


@rule("TensorListReserve", "EmptyTensorList")
def _new_list(node: Node) -> Dependence:
    return replace(FREE, zero=True)


@rule("TensorListSetItem", "TensorListPushBack")
def _put(node: Node) -> Dependence:
    value = node.inputs[-1]
    held = node.inputs[0]
    return value if held.zero and not held.data else joined(held, value) or value


@rule("TensorListGetItem", "TensorListPopBack")
def _got(node: Node) -> Any:
    value = node.inputs[0]
    return [value] * len(node.op.outputs)


@rule("TensorListStack")
def _stacked(node: Node) -> Dependence:
    value = node.inputs[0]
    return value if value.axis is None else replace(value, axis=value.axis + 1)


@rule("TensorListFromTensor")
def _unstacked(node: Node) -> Dependence:
    value = node.inputs[0]
    if value.axis is None:
        return value
    return replace(value, axis=value.axis - 1) if value.axis else node.lost("it takes single samples")


@rule("TensorListLength", "TensorListElementShape")
def _of_a_list(node: Node) -> Dependence:
    return FREE


@rule("ReverseV2", "Roll", "Cumsum", "Cumprod", "CumulativeLogsumexp")
def _along_an_axis(node: Node) -> Dependence:
    value, rank = node.inputs[0], node.rank(0)
    axes = node.constant(2 if node.op.type == "Roll" else 1)
    if value.axis is None:
        return replace(value, entries=None)
    if axes is None or rank is None or value.axis in {int(axis) % rank for axis in np.asarray(axes).reshape(-1)}:
        return node.lost("it sets samples against each other")
    return replace(value, positions=False) if node.op.type != "Cumprod" else settled(value)
