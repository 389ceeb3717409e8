"""Results of trials, which count portions, turned into samples for the user.

A portion is the smallest part of an element that keeps the proportions of its streams. Its samples are those of the
first part, which ``target_batch`` counts too. A portion of ordinary batches is one sample, so that nothing changes.

This module knows no TensorFlow; importing it imports none.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from autobatch.records import MemoryModel, Plan, SearchResult, TrialResult

if TYPE_CHECKING:
    from autobatch.trial.protocol import Trials


def samples_in_portion(trials: Trials) -> int:
    """Return the samples in what a size of these trials counts: 1, unless streams are cut in proportion."""
    return int(getattr(trials, "samples_in_portion", 1))


def trial_in_samples(trial: TrialResult, each: int) -> TrialResult:
    """Return a trial's result with its size in samples, of which a portion has ``each``."""
    return trial if each == 1 else dataclasses.replace(trial, micro_batch=trial.micro_batch * each)


def plan_in_samples(plan: Plan, each: int) -> Plan:
    """Return a plan in samples, of which a portion has ``each``."""
    if each == 1:
        return plan
    return dataclasses.replace(
        plan,
        micro_batch=plan.micro_batch * each,
        effective_batch=plan.effective_batch * each,
        samples_in_portion=each,
    )


def result_in_samples(result: SearchResult, each: int) -> SearchResult:
    """Return a search's result in samples, of which a portion has ``each``."""
    if each == 1:
        return result
    model = result.memory_model
    return dataclasses.replace(
        result,
        largest_fit=None if result.largest_fit is None else result.largest_fit * each,
        smallest_failure=None if result.smallest_failure is None else result.smallest_failure * each,
        trials=tuple(trial_in_samples(trial, each) for trial in result.trials),
        memory_model=None if model is None else MemoryModel(model.fixed_bytes, model.per_sample_bytes / each),
    )
