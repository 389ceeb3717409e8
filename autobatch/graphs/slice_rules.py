"""Rules for slices, splits and joins of the samples of a batch. See :mod:`autobatch.graphs.sample_rules`.

Tensors may be put side by side along the samples, as two streams that go through a network together are. What takes
them apart again, at their own bounds, has the samples of one of them. Any other slice takes some of the samples, and is
not followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from autobatch.graphs.dependence import FREE, Dependence, merged, piece_from, same_degree
from autobatch.graphs.sample_rules import Node, rule
from autobatch.graphs.shape_rules import entries_of, multiples_of, partly_constant, vector


@rule("StridedSlice")
def _strided_slice(node: Node) -> Dependence:
    value = node.inputs[0]
    masks = {name: node.op.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    begin, end, strides = (node.constant(place) for place in (1, 2, 3))
    if value.entries is not None:
        return _entries_sliced(value.entries, begin, end, strides, masks, value)
    if value.axis is None:
        return replace(value, zero=False)
    rank, count = node.rank(0), node.op.inputs[1].shape[0]
    if rank is None or count is None:
        return node.lost("of unknown rank")
    new = [bool(masks["new_axis"] >> place & 1) for place in range(count)]
    ellipsis = next((place for place in range(count) if masks["ellipsis"] >> place & 1), count)
    hidden = rank - sum(not new[place] for place in range(count) if place != ellipsis)
    axis = made = 0
    for place in range(count + 1):
        if place == ellipsis:
            if axis <= value.axis < axis + hidden:
                return replace(value, axis=made + value.axis - axis, positions=False)
            axis, made = axis + hidden, made + hidden
        elif place < count and new[place]:
            made += 1
        elif place < count:
            if axis == value.axis:
                takes_all = masks["begin"] >> place & 1 and masks["end"] >> place & 1
                if takes_all and strides is not None and strides[place] == 1:
                    return replace(value, axis=made, positions=False)
                piece = None
                if strides is not None and strides[place] == 1 and not masks["shrink_axis"] >> place & 1:
                    bounds = [
                        (True, None) if masks[name] >> place & 1 else _multiple_at(node, 1 + after, place)
                        for after, name in enumerate(("begin", "end"))
                    ]
                    piece = _piece(value, bounds)
                return replace(piece, axis=made) if piece else node.lost("it takes some of the samples")
            axis += 1
            made += not masks["shrink_axis"] >> place & 1
    return node.lost("of unknown rank")


def _multiple_at(node: Node, place: int, index: int) -> tuple[bool, Fraction | None]:
    """Return True and the multiple of the number of samples at an index of a vector; False if it is none."""
    known = partly_constant(node.op.inputs[place])
    if known is not None and known[index] is not None:
        return known[index] == 0, Fraction(0)
    value, length = node.inputs[place], node.op.inputs[place].shape[0]
    multiple = None if length is None else multiples_of(value, length)[index]
    return multiple is not None, multiple


def _piece(value: Dependence, bounds: Sequence[tuple[bool, Fraction | None]]) -> Dependence | None:
    (told_begin, begin), (told_end, end) = bounds
    return piece_from(value, begin, end) if told_begin and told_end else None


def _entries_sliced(entries: Any, begin: Any, end: Any, strides: Any, masks: Any, value: Dependence) -> Dependence:
    if begin is None or end is None or strides is None or len(begin) != 1:
        return replace(value, degree=None, entries=None, multiples=None)
    multiples = multiples_of(value, len(entries))
    if masks["shrink_axis"] & 1:
        one = int(begin[0])
        return replace(value, degree=entries[one], entries=(entries[one],), multiples=(multiples[one],))
    start = None if masks["begin"] & 1 else int(begin[0])
    stop = None if masks["end"] & 1 else int(end[0])
    taken = entries[start : stop : int(strides[0])]
    return replace(vector(taken, multiples[start : stop : int(strides[0])]), data=value.data, weights=value.weights)


@rule("Slice")
def _slice(node: Node) -> Dependence:
    value = node.inputs[0]
    begin, size = partly_constant(node.op.inputs[1]), partly_constant(node.op.inputs[2])
    if value.entries is not None and begin and size and None not in (*begin, *size):
        start, length = begin[0] or 0, size[0]
        taken = value.entries[start:] if length == -1 else value.entries[start : start + (length or 0)]
        return replace(vector(taken), data=value.data)
    if value.axis is None:
        return replace(value, zero=False, entries=None)
    entries = entries_of(node.inputs[2], node.op.inputs[2])
    whole = size is not None and size[value.axis] == -1
    whole = whole or (entries is not None and entries[value.axis] == 1 and value.parts == 1)
    if begin is None or begin[value.axis] != 0 or not whole:
        return node.lost("it takes some of the samples")
    return replace(value, positions=False)


def _together(node: Node, operands: Sequence[Dependence]) -> Dependence:
    """Return the dependence of pieces that are put side by side."""
    axes = {each.axis for each in operands}
    if len(axes) > 1:
        return node.lost("samples beside what is none")
    first = next((each for each in operands if each.axis is not None and each.data), operands[0])
    parts = {each.parts for each in operands}
    linear = all(each.linear for each in operands)
    result = replace(merged(first, operands), degree=same_degree(operands), linear=linear)
    return replace(result, parts=first.parts if len(parts) == 1 else None, zero=all(each.zero for each in operands))


@rule("ConcatV2")
def _concat(node: Node) -> Dependence:
    operands, axis = list(node.inputs[:-1]), node.constant(len(node.inputs) - 1)
    tensors = node.op.inputs[:-1]
    if all(each.axis is None for each in operands):
        known = [entries_of(each, tensor) for each, tensor in zip(operands, tensors, strict=True)]
        result = _together(node, operands)
        if any(each.entries is not None for each in operands) and None not in known:
            entries = [degree for part in known for degree in part or ()]
            multiples = [
                each
                for value, part in zip(operands, known, strict=True)
                for each in multiples_of(value, len(part or ()))
            ]
            return replace(vector(entries, multiples), data=result.data)
        return result
    rank = node.rank(0)
    if axis is None or rank is None:
        return node.lost("along a dimension that is not known")
    where = int(axis) % rank
    if any(each.axis == where for each in operands):
        if any(each.axis not in (where, None) or each.axis is None for each in operands):
            return node.lost("samples beside what is none")
        parts = None if any(each.parts is None for each in operands) else sum(each.parts or 0 for each in operands)
        result = _together(node, operands)
        pieces: list[Fraction] | None = []
        for each in operands:
            own = each.pieces or (None if each.parts is None else (each.parts,))
            pieces = None if pieces is None or own is None or each.selected else [*pieces, *own]
        result = replace(result, pieces=None if pieces is None else tuple(pieces))
        return replace(result, parts=None if parts is None else Fraction(parts), scattered=True)
    result = _together(node, operands)
    return replace(result, positions=bool(operands[0].positions))


@rule("Pack")
def _pack(node: Node) -> Dependence:
    operands, rank = list(node.inputs), node.rank(0)
    result = _together(node, operands)
    if result.unknown:
        return result
    if result.axis is None:
        entries = [entries_of(each, tensor) for each, tensor in zip(operands, node.op.inputs, strict=True)]
        if rank == 0 and None not in entries:
            multiples = tuple(multiples_of(each, 1)[0] for each in operands)
            return replace(result, entries=tuple(part[0] for part in entries if part), multiples=multiples)
        return replace(result, entries=None, multiples=None)
    if rank is None:
        return node.lost("of unknown rank")
    where = node.op.get_attr("axis") % (rank + 1)
    moved = result.axis + (where <= result.axis)
    return replace(result, axis=moved, positions=operands[0].positions, entries=None)


@rule("Unpack")
def _unpack(node: Node) -> Any:
    value, rank = node.inputs[0], node.rank(0)
    if value.entries is not None:
        return [replace(FREE, degree=degree, entries=(degree,)) for degree in value.entries]
    if value.axis is None:
        return value
    if rank is None or (where := node.op.get_attr("axis") % rank) == value.axis:
        return node.lost("it takes single samples")
    return replace(value, axis=value.axis - (where < value.axis), positions=False)


@rule("Split", "SplitV")
def _split(node: Node) -> Any:
    place = 1 if node.op.type == "Split" else 0
    value, rank, axis = node.inputs[place], node.rank(place), node.constant(0 if place else 2)
    if value.axis is None:
        return replace(value, entries=None)
    if rank is None or axis is None or int(axis) % rank == value.axis:
        return _pieces_split(node, value) or node.lost("it takes some of the samples")
    return value


def _pieces_split(node: Node, value: Dependence) -> list[Dependence] | None:
    """Return the parts of tensors that were put side by side, if the split takes them apart again."""
    count, total = len(node.op.outputs), sum(value.pieces or ())
    sizes: Sequence[Fraction | None] = [Fraction(total) / count] * count
    if node.op.type == "SplitV":
        sizes = multiples_of(node.inputs[1], count)
    found, begin = [], Fraction(0)
    for size in sizes:
        piece = None if size is None else piece_from(value, begin, begin + size)
        if piece is None or size is None:
            return None
        found.append(piece)
        begin += size
    return found


@rule("Pad", "PadV2", "MirrorPad")
def _pad(node: Node) -> Dependence:
    value, paddings = node.inputs[0], node.constant(1)
    if value.axis is None:
        return replace(value, entries=None)
    if paddings is None or paddings[value.axis].any():
        return node.lost("it adds to the batch")
    return replace(value, positions=False)
