"""Samples that vary in length: a micro-batch for an effective batch that is shorter or longer than the trials' was.

A search tries its sizes on the longest samples that it has seen. What is proven there is a number of elements,
``micro_batch * elements_per_sample``, not of samples:

* A shorter effective batch runs with as many elements, so with more samples at a time. What a micro-batch needs falls
  with the length at least in a straight line (attention: with its square), but for what a sample needs whatever its
  length is; should that show, by running out of memory, the step is rolled back as ever and the factor halved.
* A longer one runs with fewer samples from the start, rather than into out of memory. What one sample needs is taken
  to grow with the square of its length, which holds for attention and is careful for the rest; as long as the peak
  that was measured, grown like that, stays within the budget, the micro-batch stays as it is.

The size is a tensor to the step, so that none of this needs a new trace; under XLA, where it would, the micro-batch
stays what it is. So it does where a sample's length cannot be read from a shape: strings and sparse tensors.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from autobatch.records import MemoryModel, Report
from autobatch.recovery.micro_batch_policy import evened
from autobatch.tensors.batch_structure import Structure
from autobatch.types import Batch, Tensor


class LengthRule:
    """Sizes micro-batches by the length of an effective batch, relative to what the trials ran.

    Args:
        structure: of the data.
        tried: the leaves of a micro-batch that trials ran, of any number of samples; None where none did.
        peak_bytes, micro_batch: what the trial at the planned size needed; None where it is not known.
        memory_model: tells which part of the peak does not grow with the samples.
        budget_bytes: what the peak may be; None where there is no limit.
    """

    def __init__(
        self,
        structure: Structure,
        tried: list[Any] | None,
        *,
        peak_bytes: int | None = None,
        micro_batch: int | None = None,
        memory_model: MemoryModel | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self._structure = structure
        self._varying = [] if tried is None else _varying_leaves(structure)
        self._tried = [_elements(tried[index]) for index in self._varying] if tried is not None else []
        self._growing_bytes: float | None = None
        self._room_bytes = 0.0
        if peak_bytes is not None and micro_batch is not None and budget_bytes is not None:
            fixed = 0.0 if memory_model is None else min(max(memory_model.fixed_bytes, 0.0), peak_bytes)
            self._growing_bytes = max(peak_bytes - fixed, 1.0) / micro_batch
            self._room_bytes = budget_bytes - fixed
        self._most = math.inf

    @classmethod
    def after_search(cls, structure: Structure, tried: list[Any], report: Report) -> LengthRule:
        """The rule for a plan; without a search, or under XLA, one that leaves every size as it is."""
        plan, environment = report.plan, report.environment
        if plan is None or environment.jit_compile or not report.trials:
            return cls(structure, None)
        peaks = [trial.peak_bytes for trial in report.trials if trial.fits and trial.micro_batch == plan.micro_batch]
        return cls(
            structure,
            tried,
            peak_bytes=peaks[-1] if peaks else None,
            micro_batch=plan.micro_batch,
            memory_model=report.memory_model,
            budget_bytes=environment.budget_bytes,
        )

    def ratio(self, data: Batch) -> float:
        """How long the samples of an effective batch are, relative to those that were tried: 1 is as long."""
        if not self._varying:
            return 1.0
        leaves = self._structure.leaves(data)
        lengths = [_elements(leaves[index]) for index in self._varying]
        return max(length / tried for length, tried in zip(lengths, self._tried, strict=True))

    def sized(self, micro_batch: int, ratio: float, samples: int) -> int:
        """The micro-batch for ``samples`` of this length where ``micro_batch`` is what suits the length tried."""
        if ratio < 1:
            larger = min(samples, int(micro_batch * min(1 / ratio, self._most) + 1e-6))
            return micro_batch if larger <= micro_batch else max(micro_batch, evened(larger, samples))
        if ratio > 1:
            smaller = int(micro_batch / ratio + 1e-6)
            if self._growing_bytes is not None:
                smaller = int(self._room_bytes / (self._growing_bytes * ratio**2))
            return max(1, min(micro_batch, smaller))
        return micro_batch

    def failed(self, factor: float) -> None:
        """A micro-batch ``factor`` times as large as the one for the length tried ran out of memory."""
        self._most = max(1.0, factor / 2)


def _varying_leaves(structure: Structure) -> list[int]:
    """The positions of the leaves whose samples vary in length; empty where the length of any cannot be told."""
    specs = structure.specs
    if any(isinstance(spec, tf.SparseTensorSpec) or spec.dtype == tf.string for spec in specs):
        return []
    return [
        index
        for index, spec in enumerate(specs)
        if isinstance(spec, tf.RaggedTensorSpec) or spec.shape.rank is None or None in spec.shape.as_list()[1:]
    ]


def _elements(leaf: Tensor) -> int:
    """Elements of a sample once the batch is padded to its longest, at least 1."""
    if isinstance(leaf, tf.RaggedTensor):
        with tf.device("CPU:0"):
            shape = leaf.bounding_shape().numpy()
    else:
        shape = leaf.shape
    return max(1, math.prod(int(size) for size in shape[1:]))
