"""Dependence of a traced step's tensors on the samples of the batch: the record, and how two of them combine.

A loss is a mean over samples, a sum, or something else, and the gradient of a micro-batch counts accordingly. The graph
shows which. Each tensor is followed from the batch on, with the dimension that counts samples. Once that dimension is
summed up, the result grows with some power of the number of samples: its *degree*. A mean has the degree 0, a sum the
degree 1, and a division by the number of samples takes one off.

This module knows no operation; the rules for each are in :mod:`autobatch.graphs.sample_rules`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

COMPARES = "(it sets samples against each other)"
"""End of :attr:`Dependence.unknown` if its operation, named before it, sets samples against each other."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """Record of what is known about one tensor.

    ``axis`` is the dimension that counts samples, None where none does. ``degree`` is the power of the number of
    samples with which every number in it grows when the samples are repeated. It is None if there is no such power.
    ``data`` is True if the tensor depends on the samples, and not on weights and constants alone. ``weights`` is True
    if it depends on a variable.

    Without an axis, ``linear`` is True if the tensor is a sum of contributions, one for each sample. ``mixed`` names
    the operations through which one sample came to depend on the others. ``added`` names those whose results were so
    far only added to each sample. A sum or a mean over the samples undoes that.

    ``parts`` is the number of entries that the axis has for each sample, None where it is unknown. ``selected`` is True
    if the tensor holds only some of the samples, picked by their data. ``scattered`` is True if a sample's entries are
    not side by side. ``pieces`` are the entries for each sample of the tensors that were put side by side then, in
    order; None where they are unknown. ``entries`` are the degrees of a vector's numbers, where they were computed from
    shapes, and ``multiples`` their multiples of the number of samples, None for one that is no such multiple.
    ``positions`` is True if a vector counts the samples: 0, 1, 2, and so on. ``zero`` is True for a constant 0, which
    adds nothing. ``unknown`` names the operation behind which nothing is known, and is empty otherwise.
    """

    axis: int | None = None
    degree: int | Fraction | None = 0
    data: bool = False
    weights: bool = False
    linear: bool = True
    mixed: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    parts: Fraction | None = Fraction(1)
    selected: bool = False
    scattered: bool = False
    pieces: tuple[Fraction, ...] | None = None
    entries: tuple[int | None, ...] | None = None
    multiples: tuple[Fraction | None, ...] | None = None
    positions: bool = False
    zero: bool = False
    unknown: str = ""

    @property
    def compares(self) -> bool:
        """True if the dependence is unknown because samples were set against each other."""
        return self.unknown.endswith(COMPARES)

    @property
    def is_plain_sum(self) -> bool:
        """True if the tensor is a sum of the samples' contributions that grows with a known power of their number."""
        return self.axis is None and self.linear and self.degree is not None and not self.unknown


FREE = Dependence()
"""Dependence of a constant, or of what is made of constants."""

Degree = int | Fraction | None


def unknown(name: str) -> Dependence:
    """Return the dependence of a tensor that the operation ``name`` makes of the samples in an unknown way."""
    return Dependence(degree=None, data=True, linear=False, unknown=name)


def first_unknown(operands: Iterable[Dependence]) -> Dependence | None:
    """Return the first operand whose dependence is unknown; None if there is none."""
    return next((operand for operand in operands if operand.unknown), None)


def same_degree(operands: Iterable[Dependence]) -> Degree:
    """Return the degree that all operands but zeros share; 0 if all are zeros, None if the degrees differ."""
    degrees = {operand.degree for operand in operands if not operand.zero}
    return degrees.pop() if len(degrees) == 1 else 0 if not degrees else None


def merged(result: Dependence, operands: Iterable[Dependence]) -> Dependence:
    """Return ``result`` with what any of the operands makes true of all that is computed from it."""
    operands = tuple(operands)
    return replace(
        result,
        data=any(operand.data for operand in operands),
        weights=any(operand.weights for operand in operands),
        mixed=frozenset().union(*(operand.mixed for operand in operands)),
        added=frozenset().union(*(operand.added for operand in operands)),
        selected=any(operand.selected for operand in operands if operand.axis is not None),
        scattered=any(operand.scattered for operand in operands if operand.axis is not None),
        entries=None,
        multiples=None,
        positions=False,
        zero=False,
    )


def settled(value: Dependence) -> Dependence:
    """Return ``value`` after a nonlinear operation: what was only added to the samples is mixed with them now."""
    return replace(value, mixed=value.mixed | value.added, added=frozenset())


def summed(value: Dependence, name: str, *, mean: bool) -> Dependence:
    """Return the dependence of the sum or mean of ``value`` over its axis; ``name`` is the operation's."""
    if value.selected and mean:
        return replace(_without_axis(value), degree=None, linear=False)
    degree = value.degree if mean or value.degree is None else value.degree + 1
    linear = value.degree is not None and value.linear
    total = _without_axis(value)
    # Adding the samples up undoes what was added to all of them, but not what mixed them with each other.
    return replace(total, degree=degree, linear=linear, added=frozenset({name}) if value.data else frozenset())


def _without_axis(value: Dependence) -> Dependence:
    value = replace(value, axis=None, parts=Fraction(1), selected=False, scattered=False, pieces=None)
    return replace(value, entries=None, multiples=None, positions=False)


def piece_from(value: Dependence, begin: Fraction | None, end: Fraction | None) -> Dependence | None:
    """Return the entries from ``begin`` to ``end``, multiples of the number of samples, of tensors put side by side.

    The result is None unless these are whole tensors. None for ``begin`` or ``end`` is the first or the last.
    """
    if value.selected or value.pieces is None:
        return None
    bounds = [Fraction(0)]
    for piece in value.pieces:
        bounds.append(bounds[-1] + piece)
    begin, end = begin or bounds[0], bounds[-1] if end is None else end
    if begin not in bounds or end not in bounds or begin >= end:
        return None
    taken = value.pieces[bounds.index(begin) : bounds.index(end)]
    return replace(value, parts=end - begin, pieces=taken, scattered=len(taken) > 1, positions=False)


def joined(one: Dependence | None, other: Dependence | None) -> Dependence | None:
    """Return the dependence of a tensor that may be either one: of two branches, or of two rounds of a loop."""
    if one is None or other is None or one == other:
        return one if other is None else other
    if one.unknown or other.unknown:
        return one if one.unknown else other
    if one.axis != other.axis and (one.data or one.axis is not None) and (other.data or other.axis is not None):
        return unknown("a branch or a loop")
    axis = one.axis if one.axis is not None else other.axis
    with_axis = one if one.axis is not None else other
    result = replace(
        with_axis,
        axis=axis,
        degree=same_degree((one, other)),
        linear=one.linear and other.linear,
        parts=one.parts if one.parts == other.parts else None,
    )
    zero = one.zero and other.zero
    return replace(merged(result, (one, other)), zero=zero)
