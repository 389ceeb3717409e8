"""Copies of what is held on a device, laid into the smallest gaps before each trial and before training.

Where a value lies in the middle of the largest free piece, a size fits or not by what ran before it. Updates make
weights anew, so that they wander: in one arena 327 samples failed behind a trial of 157, and 338 ran a moment later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from autobatch.memory import arena, limits
from autobatch.tensors.variables import components
from autobatch.types import Variable

_ROUND_BYTES = 256
"""Unit to which TensorFlow's allocators round a block up."""

_GAPS_TRIED = 8
"""Number of gaps that are tried for one value; those passed over are held until it has found one."""


def lay_anew(variables: Iterable[Variable], device: str) -> None:
    """Copy each variable's value to another place of its device's memory: into the smallest gap that it fills.

    A variable for whose copy there is no room stays where it is. The allocator gives a gap whole to a value that takes
    more than half of it. Such a gap is passed over, so that no more memory is held afterwards than before.

    ``device`` is the trials' device. On a CPU without a limited arena nothing is done: each value there has memory of
    its own.
    """
    if device.startswith("CPU") and arena.arena_limit_bytes(device) is None:
        return
    for variable in components(variables):
        # Not every type of values can be copied on every kind of device.
        with contextlib.suppress(tf.errors.OpError), tf.device(variable.device):
            copy = _copy_in_a_gap(variable.read_value(), variable.device.rpartition("device:")[2])
            if copy is not None:
                variable.assign(copy)


def _copy_in_a_gap(value: Any, device: str) -> Any:
    """Return a copy of ``value`` that takes no more of ``device`` than its own bytes, rounded up; None if none does."""
    most = -(-value.shape.num_elements() * value.dtype.size // _ROUND_BYTES) * _ROUND_BYTES
    passed_over: list[Any] = []
    while len(passed_over) < _GAPS_TRIED:
        before = limits.bytes_in_use(device) or 0
        copy = tf.raw_ops.DeepCopy(x=value)
        if (limits.bytes_in_use(device) or 0) - before <= most:
            return copy
        passed_over.append(copy)
    return None
