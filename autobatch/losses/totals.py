"""Totals of the effective batch that are counted beforehand, and the kinds of its logs."""

from __future__ import annotations

import enum
from typing import Any

import tensorflow as tf


class Mode(enum.Enum):
    """Purpose of a trace: training with known totals, or counting them."""

    TRAIN = "train"
    COUNT = "count"


class LogKind(enum.Enum):
    """Rule by which a part of the micro-batches' logs becomes the effective batch's."""

    LAST = "last"
    """Value of the last micro-batch: a metric's result, or a constant."""
    AVERAGED = "averaged"
    """Sum over the micro-batches of the weighed value times the micro-batch's share."""
    SUMMED = "summed"
    JOINED = "joined"
    """Concatenation of a number, or a row, for each sample."""
    LARGEST = "largest"
    SMALLEST = "smallest"
    NOT_TOLD = "not told"
    """Average if it is one number, else value of the last micro-batch; either may differ from the effective batch's."""


class Totals:
    """Sums over the effective batch that one trace needs beforehand, in the order in which it asks for them.

    ``vector`` holds them, as float64. :attr:`counted` collects this micro-batch's parts in either mode.
    """

    def __init__(self, mode: Mode, vector: Any) -> None:
        self.mode = mode
        self._vector = vector
        self._at: Any = 0
        self.counted: list[Any] = []
        self.given: list[Any] = []
        """Totals of the effective batch that were asked for, one for each of ``counted``; none while counting."""

    def of(self, part: Any) -> Any:
        """Return the total of ``part`` over all micro-batches; ``part`` itself while counting. Both are float64."""
        flat = tf.reshape(tf.cast(part, tf.float64), [-1])
        self.counted.append(flat)
        if self.mode is Mode.COUNT:
            return tf.cast(part, tf.float64)
        size = part.shape.num_elements()
        total = tf.reshape(self._vector[self._at : self._at + size], part.shape)
        self._at += size
        self.given.append(total)
        return total

    @property
    def length(self) -> int:
        """Count of the numbers that were asked for."""
        return sum(part.shape.num_elements() for part in self.counted)
