"""Copies of what is held on a device, laid into the smallest gaps before each trial and before training.

Where a value lies in the middle of the largest free piece, a size fits or not by what ran before it. Updates make
weights anew, so that they wander: in one arena 327 samples failed behind a trial of 157, and 338 ran a moment later.
Sums of gradients wander too, since each update makes them anew: they may come to lie behind a batch that then goes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

import tensorflow as tf

from autobatch.memory import arena, limits
from autobatch.memory.arena_regions import ROUND_BYTES
from autobatch.tensors.variables import components
from autobatch.types import Tensor, Variable

logger = logging.getLogger("autobatch")

_GAPS_TRIED = 8
"""Number of gaps that are tried for one value; those passed over are held until it has found one."""

_ROOM = 4
"""Times that a value must fit into what is free, to be copied: a failed allocation waits ten seconds."""


def lay_anew(variables: Iterable[Variable], device: str) -> None:
    """Copy each variable's value to another place of its device's memory: into the smallest gap that it fills.

    The allocator gives a gap whole to a value that takes more than half of it. Such a gap is passed over, so that no
    more memory is held afterwards than before. What a nearly full device has no room for stays where it is.

    ``device`` is the trials' device. On a CPU without a limited arena nothing is done: each value there has memory of
    its own.
    """
    if device.startswith("CPU") and arena.arena_limit_bytes(device) is None:
        return
    limit_bytes = limits.find_limit(device).limit_bytes or sys.maxsize
    try:
        # The small ones first: what they leave is a gap for a large one.
        for variable in sorted(components(variables), key=_value_bytes):
            of_it = variable.device.rpartition("device:")[2]
            value_bytes = _value_bytes(variable)
            if not value_bytes or _ROOM * value_bytes > limit_bytes - (limits.bytes_in_use(of_it) or 0):
                continue
            with tf.device(variable.device):
                value = variable.read_value()
                if value.shape != variable.shape:  # a sum that rests has no value
                    continue
                copy = _copy_in_a_gap(value, value_bytes, of_it)
                if copy is not None:
                    variable.assign(copy)
    except tf.errors.ResourceExhaustedError:  # what is free is in small pieces
        logger.debug("%s is too full to lay anew what is held", device)


def _value_bytes(variable: Variable) -> int:
    return int(variable.shape.num_elements() or 0) * int(variable.dtype.size)


def _copy_in_a_gap(value: Tensor, value_bytes: int, device: str) -> Tensor | None:
    """Return a copy of ``value`` that takes no more of ``device`` than its own bytes, rounded up; None if none does.

    It is None too for a type of values that cannot be copied on this kind of device.
    """
    most = -(-value_bytes // ROUND_BYTES) * ROUND_BYTES
    passed_over: list[Tensor] = []
    while len(passed_over) < _GAPS_TRIED:
        before = limits.bytes_in_use(device) or 0
        try:
            copy = tf.raw_ops.DeepCopy(x=value)
        except (tf.errors.NotFoundError, tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            return None
        if (limits.bytes_in_use(device) or 0) - before <= most:
            return copy
        passed_over.append(copy)
    return None
