"""Rules for shapes, and for operations that give a tensor another one. See :mod:`autobatch.graphs.sample_rules`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.graphs.dependence import FREE, Dependence, unknown
from autobatch.graphs.sample_rules import Node, rule
from autobatch.types import Tensor


def vector(entries: Sequence[int | None], multiples: Sequence[Fraction | None] | None = None) -> Dependence:
    """Return the dependence of a vector of numbers that are made of shapes and have the degrees ``entries``.

    ``multiples`` are those of the number of samples.
    """
    degrees = set(entries)
    known = None if multiples is None else tuple(multiples)
    return Dependence(degree=degrees.pop() if len(degrees) == 1 else None, entries=tuple(entries), multiples=known)


def multiples_of(value: Dependence, count: int) -> tuple[Fraction | None, ...]:
    known = value.entries is not None and value.multiples is not None and len(value.multiples) == count
    return value.multiples if known and value.multiples is not None else (None,) * count


def entries_of(value: Dependence, tensor: Tensor) -> tuple[int | None, ...] | None:
    """Return the degree of each number of a vector that holds a shape; None where they are unknown."""
    if value.entries is not None:
        return value.entries
    if value.data or value.axis is not None:
        return None
    length = 1 if tensor.shape.rank == 0 else tensor.shape[0] if tensor.shape.rank == 1 else None
    degree = value.degree if isinstance(value.degree, int) else None
    return None if length is None else (degree,) * length


@rule("Shape")
def _shape(node: Node) -> Dependence:
    return _shape_of(node, 0)


@rule("ShapeN")
def _shapes(node: Node) -> list[Dependence]:
    return [_shape_of(node, place) for place in range(len(node.inputs))]


def _shape_of(node: Node, place: int) -> Dependence:
    value, rank = node.inputs[place], node.rank(place)
    if node.op.inputs[place].shape.is_fully_defined():
        return vector((0,) * (rank or 0))
    if value.unknown or rank is None:
        return node.lost()
    if value.axis is None:
        return vector((0,) * rank)
    if value.selected:
        # The number of picked samples is a sum over the samples.
        counts = vector(tuple(int(axis == value.axis) for axis in range(rank)))
        return replace(counts, data=True, weights=value.weights, added=frozenset({node.op.name}))
    multiples = [value.parts if axis == value.axis else None for axis in range(rank)]
    return vector(tuple(int(axis == value.axis) for axis in range(rank)), multiples)


@rule("Size")
def _size(node: Node) -> Dependence:
    value = node.inputs[0]
    if node.op.inputs[0].shape.is_fully_defined():
        return FREE
    if value.unknown:
        return value
    if value.axis is None:
        return FREE
    if not value.selected:
        return Dependence(degree=1)
    return Dependence(degree=1, data=True, weights=value.weights, added=frozenset({node.op.name}))


@rule("Rank")
def _rank(node: Node) -> Dependence:
    return FREE


@rule("ZerosLike")
def _zeros_like(node: Node) -> Dependence:
    value = _alike(node)
    return value if value.unknown else replace(value, zero=True)


@rule("OnesLike")
def _ones_like(node: Node) -> Dependence:
    return _alike(node)


def _alike(node: Node) -> Dependence:
    value = node.inputs[0]
    if value.unknown:
        return FREE if node.op.inputs[0].shape.is_fully_defined() else value
    return Dependence(axis=value.axis, parts=value.parts, selected=value.selected, scattered=value.scattered)


def _axis_in(entries: Sequence[int | None] | None) -> int | None:
    """Return the dimension of a shape that counts samples; None if none does, -1 if that is unknown."""
    if entries is None or None in entries:
        return -1
    found = [axis for axis, degree in enumerate(entries) if degree]
    return None if not found else found[0] if len(found) == 1 and entries[found[0]] == 1 else -1


def made_in_shape(node: Node, place: int, content: Dependence) -> Dependence:
    """Return the dependence of ``content`` in the shape that the input at ``place`` holds."""
    axis = _axis_in(entries_of(node.inputs[place], node.op.inputs[place]))
    if axis == -1:
        return node.lost("of a shape that is not known")
    if axis is None:
        return content
    return replace(content, axis=axis, parts=None, entries=None)  # of as many entries as any other such tensor


@rule("Fill")
def _fill(node: Node) -> Dependence:
    return made_in_shape(node, 0, replace(node.inputs[1], entries=None))


@rule("Range")
def _range(node: Node) -> Dependence:
    start, limit, _ = node.inputs
    if limit.degree == 1 and not limit.data and start.zero and node.constant(2) == 1:
        return Dependence(axis=0, positions=True)
    if not any(each.data for each in node.inputs) and any(each.degree != 0 for each in node.inputs):
        return node.lost("its numbers count samples")
    # It may be as long as the batch's longest sample. Its numbers are the same whatever the batch.
    return FREE


@rule("BroadcastTo")
def _broadcast(node: Node) -> Dependence:
    value = node.inputs[0]
    length = node.op.inputs[1].shape[0] if node.op.inputs[1].shape.rank == 1 else None
    if value.axis is not None:
        rank = node.rank(0)
        if rank is None or length is None:
            return node.lost("of unknown rank")
        return replace(value, axis=value.axis + length - rank, entries=None)
    return made_in_shape(node, 1, replace(value, entries=None))


@rule("Tile")
def _tile(node: Node) -> Dependence:
    value = node.inputs[0]
    entries = entries_of(node.inputs[1], node.op.inputs[1])
    times = node.constant(1)
    if value.axis is not None:
        if times is not None and times[value.axis] == 1:
            return replace(value, entries=None)
        partly = partly_constant(node.op.inputs[1])
        if partly is not None and value.axis < len(partly) and partly[value.axis] == 1:
            return replace(value, entries=None)
        return node.lost("it repeats samples")
    axis = _axis_in(entries)
    if axis == -1:
        return replace(value, entries=None) if not value.data else node.lost("times that are not known")
    return value if axis is None else replace(value, axis=axis, parts=Fraction(1), entries=None)


def partly_constant(tensor: Tensor) -> list[int | None] | None:
    """Return the numbers of a vector as far as they are constant."""
    value = tf.get_static_value(tensor, partial=True)
    return None if value is None else [None if each is None else int(each) for each in np.asarray(value).reshape(-1)]


@rule("Reshape")
def _reshape(node: Node) -> Dependence:
    value = node.inputs[0]
    before, after = node.op.inputs[0].shape, node.op.outputs[0].shape
    if value.axis is None:
        return replace(value, entries=value.entries if before.rank in (0, 1) and after.rank in (0, 1) else None)
    if before.rank is None or after.rank is None:
        return node.lost("of unknown rank")
    if value.axis and before[: value.axis].is_fully_defined() and before[: value.axis] == after[: value.axis]:
        return replace(value, entries=None)
    told = _axis_in(entries_of(node.inputs[1], node.op.inputs[1]))
    leading = told if told not in (None, -1) else next((axis for axis, size in enumerate(after) if size != 1), None)
    start = next((axis for axis, size in enumerate(before) if size != 1), 0)
    if value.axis != start:
        merged_axes = leading is not None and after[leading] is None
        if merged_axes and not value.selected:
            value = replace(value, parts=None, scattered=True, pieces=None)
            return replace(value, axis=leading, entries=None, positions=False)
        return node.lost("it moves samples about")
    if leading is not None and before.rank > 1 and any(size != 1 for size in after[:leading]):
        return node.lost("it sets samples against each other")  # the first dimensions change places, not their numbers
    if leading is None or after[leading] is not None:
        return node.lost("it cuts the batch")
    inside, outside = _known_size(before[start + 1 :]), _known_size(after[leading + 1 :])
    if value.scattered and (value.pieces is None or inside is None or inside != outside):
        return node.lost("it cuts the batch")
    parts = value.parts
    if inside is None or outside is None or parts is None:
        parts = parts if before == after else None
    else:
        parts = parts * inside / outside
    if parts is not None and parts < 1:
        return node.lost("it sets samples against each other")
    pieces = value.pieces if parts == value.parts else None
    value = replace(value, axis=leading, parts=parts, pieces=pieces, entries=None)
    return replace(value, positions=value.positions and after.rank == 1)


def _known_size(shape: Any) -> Fraction | None:
    return None if shape.num_elements() is None else Fraction(shape.num_elements())


@rule("Transpose")
def _transpose(node: Node) -> Dependence:
    value = node.inputs[0]
    if value.axis is None:
        return replace(value, entries=None)
    order = node.constant(1)
    if order is None:
        return node.lost("in an order that is not known")
    return replace(value, axis=list(order).index(value.axis), entries=None)


@rule("ExpandDims")
def _expand(node: Node) -> Dependence:
    value, place, rank = node.inputs[0], node.constant(1), node.rank(0)
    if value.axis is None:
        return value if rank == 0 else replace(value, entries=None)
    if place is None or rank is None:
        return node.lost("at a place that is not known")
    where = int(np.asarray(place).reshape(-1)[0]) % (rank + 1)
    return replace(value, axis=value.axis + (where <= value.axis), entries=None)


@rule("Squeeze")
def _squeeze(node: Node) -> Dependence:
    value, shape = node.inputs[0], node.op.inputs[0].shape
    if value.axis is None:
        return value
    if shape.rank is None:
        return node.lost("of unknown rank")
    given = [axis % shape.rank for axis in node.op.get_attr("squeeze_dims")]
    gone = given or [axis for axis, size in enumerate(shape) if size == 1]
    if not given and node.op.outputs[0].shape.rank is None:
        return node.lost("of dimensions that are not known")
    if value.axis in gone:
        return node.lost("it takes the batch for one sample")
    return replace(value, axis=value.axis - sum(axis < value.axis for axis in gone), entries=None)


def of_argument(tensor: Tensor) -> Dependence:
    """Return the dependence of a tensor that a step is given: its first dimension counts samples."""
    return Dependence(axis=0, data=True) if tensor.shape.rank != 0 else unknown(tensor.op.name)
