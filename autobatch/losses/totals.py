"""What becomes of micro-batches in the effective batch: sums that are counted beforehand, and kinds of logs."""

from __future__ import annotations

import enum
from typing import Any

import tensorflow as tf


class Mode(enum.Enum):
    """What a trace is for: training with known totals, or counting them."""

    TRAIN = "train"
    COUNT = "count"


class Kind(enum.Enum):
    """How a part of a micro-batch's logs becomes the effective batch's."""

    LAST = "last"
    """As the last micro-batch has it: a metric's result, a constant."""
    AVERAGED = "averaged"
    """Weighed, and summed over the micro-batches times their shares."""
    SUMMED = "summed"
    JOINED = "joined"
    """A number, or a row, for each sample: one behind the other."""
    LARGEST = "largest"
    SMALLEST = "smallest"
    NOT_TOLD = "not told"
    """Averaged if it is one number, else as the last micro-batch has it; either may be another one."""


class Totals:
    """Sums over the effective batch that one trace needs beforehand, in the order in which it asks for them.

    ``vector`` holds them, as float64. While they are counted, :attr:`counted` collects this micro-batch's parts.
    """

    def __init__(self, mode: Mode, vector: Any) -> None:
        self.mode = mode
        self._vector = vector
        self._at: Any = 0
        self.counted: list[Any] = []

    def of(self, part: Any) -> Any:
        """The total, over all micro-batches, of what ``part`` is in this one; ``part`` itself while counting."""
        flat = tf.reshape(tf.cast(part, tf.float64), [-1])
        self.counted.append(flat)
        if self.mode is Mode.COUNT:
            return tf.cast(part, tf.float64)
        size = part.shape.num_elements()
        total = tf.reshape(self._vector[self._at : self._at + size], part.shape)
        self._at += size
        return total

    @property
    def length(self) -> int:
        """How many numbers are counted."""
        return sum(part.shape.num_elements() for part in self.counted)
