"""Micro-batches for effective batches whose samples are shorter or longer than those of the trials.

A search tries its sizes on the longest samples that it has seen. It proves a number of elements,
``micro_batch * elements_per_sample``, rather than a number of samples:

* A shorter effective batch runs with as many elements, so with more samples at a time. The memory of a micro-batch
  falls at least linearly with the length, for attention with its square. The part of a sample's memory that does not
  depend on its length is neglected. If memory runs out for that reason, the step is rolled back and the factor halved.
* A longer one runs with fewer samples from the start, so that memory does not run out. The memory of a sample is
  assumed to grow with the square of its length. That holds for attention and is cautious for the rest. The micro-batch
  stays the same as long as the measured peak, grown like that, stays within the budget.

The size is a tensor in the step, so another size needs no new trace. Under XLA it would, so the micro-batch stays the
same. It also stays the same if a sample's length cannot be read from a shape: for strings and sparse tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.records import MemoryModel, Report
from autobatch.recovery.micro_batch_policy import evened
from autobatch.tensors.batch_structure import Structure
from autobatch.types import Batch, Tensor


class LengthRule:
    """Rule that sizes micro-batches by the length of an effective batch, relative to that of the trials.

    Args:
        structure: the structure of the data.
        tried: the leaves of a micro-batch that trials ran, of any number of samples; None if none did.
        peak_bytes: the peak of the trial at the planned size; None if it is not known.
        micro_batch: the planned size; None if it is not known.
        memory_model: gives the part of the peak that does not grow with the samples; None takes 0.
        budget_bytes: the largest peak allowed; None if there is no limit.
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
    def after_search(cls, structure: Structure, tried: Callable[[], list[Any]], report: Report) -> LengthRule:
        """Make the rule for a report's plan; without trials, or under XLA, it leaves every size as it is.

        ``tried`` returns the leaves of a micro-batch that trials ran. It is called if samples vary in length.
        """
        plan, environment = report.plan, report.environment
        if plan is None or environment.jit_compile or not report.trials or not _varying_leaves(structure):
            return cls(structure, None)
        peaks = [trial.peak_bytes for trial in report.trials if trial.fits and trial.micro_batch == plan.micro_batch]
        return cls(
            structure,
            tried(),
            peak_bytes=peaks[-1] if peaks else None,
            micro_batch=plan.micro_batch // plan.samples_in_portion,
            memory_model=report.memory_model,
            budget_bytes=environment.budget_bytes,
        )

    def ratio(self, data: Batch) -> float:
        """Return the length of an effective batch's samples relative to that of the trials; 1 means the same length."""
        if not self._varying:
            return 1.0
        leaves = self._structure.leaves(data)
        lengths = [_elements(leaves[index]) for index in self._varying]
        return max(length / tried for length, tried in zip(lengths, self._tried, strict=True))

    def sized(self, micro_batch: int, ratio: float, samples: int) -> int:
        """Return the micro-batch for ``samples`` whose relative length is ``ratio``.

        ``micro_batch`` is the size that suits the length of the trials.
        """
        if ratio < 1:
            larger = min(samples, int(micro_batch * min(1 / ratio, self._most) + 1e-6))
            return micro_batch if larger <= micro_batch else max(micro_batch, evened(larger, samples))
        if ratio > 1:
            smaller = int(micro_batch / ratio + 1e-6)
            if self._growing_bytes is not None:
                smaller = int(self._room_bytes / (self._growing_bytes * ratio**2))
            return max(1, min(micro_batch, smaller))
        return micro_batch

    @property
    def most(self) -> float:
        """Largest factor for short samples; infinite as long as none has run out of memory."""
        return self._most

    @most.setter
    def most(self, factor: float) -> None:
        self._most = factor

    def failed(self, factor: float) -> None:
        """Limit the factor for short samples to half of ``factor``, at least 1: ``factor`` ran out of memory."""
        self._most = max(1.0, factor / 2)


def _varying_leaves(structure: Structure) -> list[int]:
    """Return the positions of leaves whose samples vary in length; empty if any leaf hides its samples' length."""
    specs = structure.specs
    if any(isinstance(spec, tf.SparseTensorSpec) or spec.dtype == tf.string for spec in specs):
        return []
    return [
        index
        for index, spec in enumerate(specs)
        if isinstance(spec, tf.RaggedTensorSpec) or spec.shape.rank is None or None in spec.shape.as_list()[1:]
    ]


def _elements(leaf: Tensor) -> int:
    """Return the elements of a sample once the batch is padded to its longest sample; at least 1."""
    if isinstance(leaf, tf.RaggedTensor):
        with tf.device("CPU:0"):
            shape = leaf.bounding_shape().numpy()
    else:
        shape = leaf.shape
    return max(1, math.prod(int(size) for size in shape[1:]))
