"""Statistics of an effective batch, put together from those of its micro-batches.

A mean is weighed by the number of elements that it was taken over. A variance follows from the micro-batches'
variances and from how far their means lie apart (Chan, Golub and LeVeque, 1979). Nothing is subtracted from a large
number, so that a batch far from zero loses no digits. Sums are added up. The largest of the largest values is taken,
and the smallest of the smallest. Statistics of one kind and type are kept side by side in one tensor. Merging them then
takes a handful of operations, however many layers have statistics. Sixteen-bit statistics are merged in 32 bits.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.types import Tensor


class StatisticKind(enum.Enum):
    """Rule by which the statistics of two micro-batches are merged."""

    MOMENTS = "moments"
    SUM = "sum"
    LARGEST = "largest"
    SMALLEST = "smallest"


@dataclass(frozen=True, slots=True)
class Statistic:
    """One or two tensors of a micro-batch: a mean, a mean and its variance, a sum, a largest or smallest value.

    ``weight`` counts the elements behind a mean: one count for all of it, or one for each of its numbers. ``sources``
    are the tensors that the statistic was taken of. They are empty where the layer is known.
    """

    kind: StatisticKind
    parts: tuple[Any, ...]
    weight: Any = None
    sources: tuple[Any, ...] = ()

    @property
    def group(self) -> tuple[StatisticKind, Any]:
        """Kind and type by which the statistic is merged; those that share both are kept in one tensor."""
        dtype = self.parts[0].dtype
        return self.kind, tf.float32 if dtype.is_floating and dtype.size < 4 else dtype

    @property
    def length(self) -> int:
        """Count of the numbers in each part of the statistic."""
        return int(self.parts[0].shape.num_elements())


Layout = list[tuple[StatisticKind, Any, int]]
"""Kind, type and count of the numbers in each tensor of packed statistics."""


def layout_of(statistics: Sequence[Statistic]) -> Layout:
    """Return the layout of :func:`packed` statistics."""
    lengths: dict[tuple[StatisticKind, Any], int] = {}
    for statistic in statistics:
        lengths[statistic.group] = lengths.get(statistic.group, 0) + statistic.length
    return [(kind, dtype, length) for (kind, dtype), length in lengths.items()]


def packed(statistics: Sequence[Statistic]) -> list[Any]:
    """Pack the statistics of one micro-batch into one tensor for each group."""
    by_group: dict[tuple[StatisticKind, Any], list[Statistic]] = {}
    for statistic in statistics:
        by_group.setdefault(statistic.group, []).append(statistic)
    return [
        _moments_of(members, dtype)
        if kind is StatisticKind.MOMENTS
        else _side_by_side([_row(one.parts[0], one, dtype) for one in members])
        for (kind, dtype), members in by_group.items()
    ]


def _moments_of(statistics: Sequence[Statistic], dtype: Any) -> Any:
    weights = [_row(one.weight, one, dtype) for one in statistics]
    means = [_row(one.parts[0], one, dtype) for one in statistics]
    variances = [_row(one.parts[1] if one.parts[1:] else tf.zeros([], dtype), one, dtype) for one in statistics]
    return moments(*(_side_by_side(each) for each in (weights, means, variances)))


def _row(part: Any, statistic: Statistic, dtype: Any) -> Any:
    """Return the numbers of a part as a vector; a single number is repeated to the statistic's length."""
    part = tf.cast(part, dtype)
    if part.shape.num_elements() == 1:
        return tf.fill([statistic.length], tf.reshape(part, []))
    return part if part.shape.rank == 1 else tf.reshape(part, [statistic.length])


def _side_by_side(rows: list[Any]) -> Any:
    return rows[0] if len(rows) == 1 else tf.concat(rows, axis=0)


def moments(weight: Any, mean: Tensor, variance: Tensor) -> Any:
    """Stack weight, mean and weighted variance of one micro-batch in one tensor; zeros where the weight is zero."""
    # The mean of no elements is NaN.
    return tf.where(weight > 0, tf.stack([weight, mean, weight * variance]), tf.zeros([], mean.dtype))


def mean_and_variance(state: Any) -> tuple[Any, Any]:
    """Return mean and variance from merged :func:`moments`."""
    weight, mean, spread = tf.unstack(state)
    return mean, tf.math.divide_no_nan(spread, weight)


def empty(layout: Layout) -> list[Any]:
    """Return packed statistics of no samples."""
    states = []
    for kind, dtype, length in layout:
        shape = [3, length] if kind is StatisticKind.MOMENTS else [length]
        start = {StatisticKind.LARGEST: dtype.min, StatisticKind.SMALLEST: dtype.max}.get(kind, 0)
        states.append(tf.fill(shape, tf.constant(start, dtype)))
    return states


def merged_statistics(layout: Layout, one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """Merge the packed statistics of two sets of samples."""
    merging = {
        StatisticKind.MOMENTS: merged_moments,
        StatisticKind.SUM: tf.add,
        StatisticKind.LARGEST: tf.maximum,
        StatisticKind.SMALLEST: tf.minimum,
    }
    return [merging[kind](*both) for (kind, _, _), *both in zip(layout, one, other, strict=True)]


def merged_moments(one: Any, other: Any) -> Any:
    """Merge the :func:`moments` of two sets of samples."""
    (weight, mean, spread), (added, other_mean, other_spread) = tf.unstack(one), tf.unstack(other)
    whole = weight + added
    share = tf.math.divide_no_nan(added, whole)
    apart = other_mean - mean
    return tf.stack([whole, mean + apart * share, spread + other_spread + apart * apart * weight * share])


def unpacked(statistics: Sequence[Statistic], states: Sequence[Any]) -> dict[int, Any]:
    """Return the packed value of each of a micro-batch's tensors by the tensor's id, in its shape and type."""
    groups = list(dict.fromkeys(statistic.group for statistic in statistics))
    state_of = dict(zip(groups, states, strict=True))
    begins = dict.fromkeys(groups, 0)
    found = {}
    for statistic in statistics:
        group, begin = statistic.group, begins[statistic.group]
        begins[group] += statistic.length
        state = state_of[group][..., begin : begin + statistic.length]
        values = mean_and_variance(state) if statistic.kind is StatisticKind.MOMENTS else (state,)
        for part, value in zip(statistic.parts, values, strict=False):
            found[id(part)] = tf.reshape(tf.cast(value, part.dtype), part.shape)
    return found
