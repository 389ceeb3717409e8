"""A trace of a step that runs eagerly: never run, it shows what the step's losses are made of, and its updates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.differences import rules
from autobatch.differences.trace_findings import TraceFindings
from autobatch.graphs.dependence import Dependence
from autobatch.graphs.sample_flow import SampleFlow
from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.losses.loss_terms import LossTerms
from autobatch.losses.loss_weights import LossWeights
from autobatch.losses.totals import Mode, Totals
from autobatch.metrics.merged_logs import Logs, kinds_of, not_told_eagerly
from autobatch.metrics.results import MetricResults
from autobatch.seams import functions, losses, metrics, models
from autobatch.seams.gradients import gradients_weighed
from autobatch.seams.optimizers import capture_apply
from autobatch.step.attributes import attributes_kept
from autobatch.step.step_trace import StepTrace
from autobatch.tensors.batch_structure import Structure, sample_count
from autobatch.types import Model, Tensor

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrialTrace:
    """Record of a trace: findings, requests, the count of numbers that are counted beforehand, and updates."""

    findings: TraceFindings
    told: tuple[tuple[str, Any], ...]
    count_length: int
    seen: StepTrace


def weighing(
    totals: Totals,
    leaves: list[Tensor],
    fraction: Tensor,
    note: Callable[[Dependence], None],
    flow: SampleFlow | None = None,
) -> tuple[LossWeights, LossTerms]:
    """Return what weighs the losses, and what follows them, in a trace on one micro-batch.

    ``flow`` follows the samples; None begins at the leaves.
    """
    terms = LossTerms(totals, fraction, sample_count(leaves), flow or SampleFlow.of_leaves(leaves, ()), note)
    return LossWeights(fraction, totals, terms), terms


def trial_trace(
    model: Model, step: Callable[[Any], Logs], structure: Structure, touched: TouchedVariables
) -> TrialTrace | None:
    """Trace an eager step without running the trace; return None where nothing can be learnt, as from other code.

    The model's attributes that the user's code changes meanwhile are put back.
    """
    if not rules.has_code_of_its_own(model) or not models.is_built(model):
        return None  # variables made in a trace that fails would stay without a value
    findings = TraceFindings()
    found: list[TrialTrace] = []

    def look(leaves: list[Tensor], fraction: Tensor, vector: Tensor) -> Any:
        seen = StepTrace(tf.compat.v1.get_default_graph())
        totals = Totals(Mode.TRAIN, vector)
        normalizer, terms = weighing(totals, leaves, fraction, findings.note_dependence)
        results = MetricResults()
        with (
            functions.functions_inlined(),
            capture_apply(touched.optimizers, seen.note_applied),
            losses.intercept_reductions(normalizer),
            metrics.single_numbers_weighed(fraction, lambda name: None, terms.weighed),
            metrics.noting_results(results.note),
            gradients_weighed(terms.gradient, findings.note_differentiated),
            losses.added_losses_noted(findings.note_added_loss),
        ):
            logs = step(structure.pack(leaves))
        batch = tf.nest.flatten([leaves, fraction, vector], expand_composites=True)
        kinds = kinds_of(logs, results, batch, terms)
        terms.weighed_logs(logs, kinds)
        findings.loose_logs = not_told_eagerly(logs, kinds, terms)
        seen.note_results(logs)
        seen.note_totals(totals)
        found[:] = [TrialTrace(findings, tuple(terms.told), totals.length - terms.counted, seen)]
        return leaves[0]

    signature = [structure.specs, tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)]
    try:
        with attributes_kept(model) as changed:
            traced = tf.function(look, autograph=False, input_signature=signature).get_concrete_function()
        touched.on_graph(traced.graph)
    except Exception as error:  # noqa: BLE001 - the code was written to run eagerly, and may need to
        logger.info("the step runs eagerly and cannot be traced: %r", error)
        return None
    findings.forget_tensors()
    (result,) = found
    if any(kind == "gradient" and None in told[0] for kind, told in result.told) and not findings.untold:
        findings.untold, findings.is_told = "a step that runs eagerly", False
    if changed and not findings.untold:  # what the step does may depend on what it counts
        findings.untold, findings.is_told = f"code that counts in {changed[0]}", False
    return result
