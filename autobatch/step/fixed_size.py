"""Code that works with one number of samples at a time alone: recognised, and said with its place.

The trace of a micro-step leaves the number of samples open. Code that asks for it as a Python number fails then, and
runs where the number is fixed. Code that holds a number itself, as ``tf.random.normal((32, 6))``, is seen in the open
trace where it meets the samples, or fails when it runs.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import tensorflow as tf

from autobatch.errors import FixedBatchSizeError
from autobatch.graphs.dependence import unknown
from autobatch.graphs.sample_flow import SampleFlow
from autobatch.tracebacks import is_library, is_own
from autobatch.types import Graph, Model, Tensor

_MEETING = frozenset(
    [
        *("Add", "AddV2", "Sub", "Mul", "RealDiv", "Div", "DivNoNan", "MulNoNan", "Maximum", "Minimum", "Pow"),
        *("SquaredDifference", "Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual", "LogicalAnd"),
        *("LogicalOr", "FloorMod", "FloorDiv", "SelectV2", "BatchMatMulV2", "BatchMatMulV3", "Atan2", "Xdivy", "Xlogy"),
    ]
)
"""Operations that broadcast one input to the other's first dimension."""


class SizeWantedError(Exception):
    """Code asks for the number of samples as a Python number, which a trace that leaves it open does not have."""


class FixedSize(NamedTuple):
    """Number of samples that a trace is written for, and the user's line that says so."""

    samples: int
    place: str


def fixed_size_in(graph: Graph, leaves: Sequence[Tensor]) -> FixedSize | None:
    """Return the number of samples that a traced step is written for; None if the trace shows none.

    It shows where samples, whose number is open, meet something that has a fixed first dimension above 1.
    """
    flow: SampleFlow | None = None
    for operation in graph.get_operations():
        if operation.type not in _MEETING:
            continue
        inputs = [each for each in operation.inputs if each.shape.rank]
        result = operation.outputs[0].shape
        open_ones = [each for each in inputs if each.shape.rank == result.rank and each.shape[0] is None]
        if not result.rank or not open_ones or result[0] is None or result[0] == 1:
            continue
        flow = flow or SampleFlow.of_leaves(leaves, ())
        for found in map(flow.of, open_ones):
            if found.axis == 0:
                samples = Fraction(int(result[0])) / (found.parts or 1)  # entries, of which a sample may have several
                return FixedSize(round(samples), _innermost(operation.traceback))
    return None


def may_want_the_size(error: BaseException) -> bool:
    """Return True for an error that code may have raised because the number of samples is open or another one."""
    if isinstance(error, (tf.errors.OpError, MemoryError)) and not isinstance(error, tf.errors.InvalidArgumentError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    # What TensorFlow raises may seem to come from a function that is called in the place of one of its own.
    return not (frames and is_own(frames[-1].filename) and (frames[-1].line or "").startswith("raise "))


def place_of(error: BaseException) -> str:
    """Return the user's line that has led to an error: file, number and text; "" if there is none."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def _innermost(frames: Iterable[Any]) -> str:
    for frame in reversed(list(frames)):
        if not is_own(frame.filename) and not is_library(frame.filename):
            line = linecache.getline(frame.filename, frame.lineno).strip()
            return f"{frame.filename}:{frame.lineno}" + (f", `{line}`," if line else "")
    return ""


def refusal(model: Model, micro_batch: int, samples: int, place: str) -> FixedBatchSizeError:
    """Return the error for a model whose code runs with ``samples`` at a time and not with ``micro_batch``."""
    where = f" at {place}" if place else ""
    return FixedBatchSizeError(
        f"The code{where} works with {samples} samples at a time and not with {micro_batch}, so that an effective "
        "batch cannot be cut into micro-batches of that size. Take the number of samples from tf.shape(x)[0], or from "
        f"x.shape[0] wherever a Python number is needed; or pass micro_batch={samples}. "
        f"Received: micro_batch={micro_batch} for {type(model).__name__}"
    )


def largest_divisor(samples: int, at_most: int) -> int:
    """Return the largest size up to ``at_most`` that cuts ``samples`` into equal parts."""
    steps = -(-samples // max(1, min(at_most, samples)))
    while samples % steps:
        steps += 1
    return samples // steps


def flow_of(leaves: list[Tensor], each: int | None) -> SampleFlow:
    """Return the flow of the samples. With their number in the trace, shapes do not tell what counts them."""
    if each is None:
        return SampleFlow.of_leaves(leaves, ())
    parts = tf.nest.flatten(leaves, expand_composites=True)
    return SampleFlow({part.name: unknown("a batch of one fixed size") for part in parts})
