"""One micro-batch through ``train_step`` or ``test_step``, and the merging of its results with those of others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.averages.running_averages import RunningAverages
from autobatch.differences.trace_findings import TraceFindings
from autobatch.graphs import draws
from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.losses.eager_terms import EagerTerms
from autobatch.losses.loss_terms import LossTerms
from autobatch.losses.loss_weights import LossWeights
from autobatch.losses.totals import Mode, Totals
from autobatch.metrics.eager_updates import EagerUpdates
from autobatch.metrics.merged_logs import Logs, MergedLogs
from autobatch.metrics.results import MetricResults
from autobatch.metrics.whole_batch import HeldUpdates
from autobatch.seams import functions, losses, metrics, models
from autobatch.seams.gradients import gradients_weighed, without_gradients
from autobatch.seams.optimizers import capture_apply
from autobatch.step.conditions import Conditions
from autobatch.step.division import Division
from autobatch.step.fixed_size import FixedSize, fixed_size_in, flow_of
from autobatch.step.micro_batch_loop import loop
from autobatch.step.second_references import SecondReferences
from autobatch.step.sink import Sink
from autobatch.step.step_trace import PartedTrace, StepTrace, is_state, no_parts_eagerly
from autobatch.step.trial_trace import trial_trace, weighing
from autobatch.tensors.batch_structure import Structure, cut, sample_count
from autobatch.types import Model, Optimizer, Tensor, Variable


class MicroStep:
    """A model's ``train_step`` or ``test_step`` on one micro-batch, whose logs merge into the effective batch's.

    Args:
        model: a compiled Keras model.
        structure: the structure of the data.
        step: the model's ``train_step`` or ``test_step``.
        touched: learns the variables that a trace shows.
        sink: takes the gradients; None in an evaluation.
        findings: the findings of an earlier trace of the same step.
        on_traced: is called when :attr:`findings` are complete; in eager code after every micro-batch.
        most_samples: the most samples in an effective batch; None if not known.
        each: the samples of every micro-batch, if the trace is to have their number; None leaves it open.
    """

    def __init__(
        self,
        model: Model,
        structure: Structure,
        step: Callable[[Any], Logs],
        touched: TouchedVariables,
        *,
        sink: Sink | None,
        findings: TraceFindings | None = None,
        on_traced: Callable[[], None] = lambda: None,
        most_samples: int | None = None,
        each: int | None = None,
    ) -> None:
        self._each = each
        self._leaves: list[Tensor] = []
        """Leaves of the micro-batch that is traced; empty outside of a trace."""
        self._model = model
        self._structure = structure
        self._step = models.untraced(step)
        self._touched = touched
        self._sink = sink
        self._on_traced = on_traced
        self.findings = findings or TraceFindings()
        """Findings from the last trace of a training step."""
        self.averages = RunningAverages(model, touched)
        """Running averages, assigned once an update; unused in an evaluation."""
        self._compiled: Callable[..., tuple[Logs, list[Any], Any]] = self._run_averaging
        self._count_compiled: Callable[..., Any] = self._run_counting
        self._second_references: SecondReferences | None = None
        self._told: tuple[tuple[str, Any], ...] = ()
        self._learnt: TraceFindings | None = None
        """Findings from a trial trace of a step that runs eagerly; None if there was none, or for a traced step."""
        self.logs = MergedLogs()
        self._held = EagerUpdates() if model.run_eagerly else HeldUpdates(most_samples)
        self._count_length: int | None = None
        self.graph: tf.Graph | None = None
        """Graph of the traced step; None before the trace, and if the step runs eagerly."""
        self.fixed_size: FixedSize | None = None
        """Number of samples that the traced step is written for; None if the trace shows none."""
        self._seen: StepTrace | None = None
        self._most_samples = most_samples
        self._inlined: frozenset[int] | None = None
        """Places of the conditions whose branches apply an optimizer; None where such branches are refused."""
        self._is_one_pass: bool | None = None
        """True if a step that runs eagerly was seen to need one pass over the micro-batches; None if not known."""
        self.parted: PartedTrace | None = None
        """Division of the traced step into parts, where its updates do not all follow one pass; else None."""

    @property
    def count_length(self) -> int | None:
        """Number of denominators that depend on the data; None until a step was traced."""
        return self._count_length

    def __call__(self, leaves: list[Tensor], fraction: Tensor, totals: Tensor) -> tuple[Logs, list[Any], Any]:
        """Run one micro-batch; return its logs, the arguments of held metric updates, and its statistics."""
        return self._compiled(leaves, fraction, totals)

    def end_pass(self) -> None:
        """Let go of what only micro-batches need, so that the update does not run beside it."""
        if self._second_references is not None:
            self._second_references.end_pass()

    def rest(self) -> None:
        """Let go of the memory that is held between micro-batches; the trace is kept."""
        if self._second_references is not None:
            self._second_references.drop()

    def release(self) -> None:
        """Let go of the memory that is held between micro-batches, and of the trace."""
        self.rest()
        self.averages.release()

    def trace(self) -> None:
        """Trace now, outside of any loop, to learn the structure of the logs and whether counts are needed.

        Raises:
            ValueError: a second trace shows another number of denominators than the first.
        """
        model, sink, specs = self._model, self._sink, self._structure.specs_of(self._each)
        if sink is not None and len(self._touched.optimizers) == 1:
            # A tf.function that creates variables while it is traced is traced a second time.
            sink.expect(model.trainable_variables)
        signature = [specs, tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)]
        inlined: set[int] = set()
        concrete = None
        while concrete is None:
            self._inlined = None if sink is None else frozenset(inlined)
            self._compiled = tf.function(
                self._run_averaging, autograph=False, jit_compile=bool(model.jit_compile), input_signature=signature
            )
            traced = self._compiled.get_concrete_function()  # type: ignore[attr-defined]
            found = self._found_in_branches()
            inlined |= found
            concrete = None if found else traced
        self.logs.note_structure(concrete.structured_outputs[0])
        self.graph = concrete.graph
        if self._each is None:
            self.fixed_size = fixed_size_in(concrete.graph, self._leaves)
        self._leaves = []
        self._touched.note_graph(concrete.graph)
        self._touched.note_written(concrete.graph)
        if sink is not None:
            sink.settle()
            self._divide(concrete.graph)
        if self.parted is not None:
            return
        if model.jit_compile:
            variables = [*self._touched.variables, *([] if sink is None else sink.variables)]
            self._second_references = SecondReferences(concrete.graph, variables)
            self._compiled = self._second_references.held_for(self._compiled)
        self._count_compiled = tf.function(self._run_counting, autograph=False, input_signature=signature)
        if self._count_length:
            expected = self._count_length
            self._count_compiled.get_concrete_function()  # type: ignore[attr-defined]
            if self._count_length != expected:
                raise ValueError(
                    f"{type(model).__name__} does not compute the same losses each time that it is traced, so "
                    "that their denominators cannot be counted beforehand. Let what it computes depend on its inputs "
                    f"alone, not on what earlier calls have left behind. Received: {expected} denominators, then "
                    f"{self._count_length}"
                )

    def _found_in_branches(self) -> set[int]:
        """Return the places of conditions whose branches apply an optimizer, and were not inlined in the last trace."""
        conditions = None if self._seen is None else self._seen.conditions
        return set() if conditions is None else conditions.found

    def _divide(self, graph: tf.Graph) -> None:
        """Find out whether the traced step updates weights at more than one place."""
        seen = self._seen
        assert seen is not None
        assert seen.graph is graph
        if len(seen.applied) < 2 and all(each.holds is None for each in seen.applied):
            return
        logs, held, _ = graph.structured_outputs
        seen.note_results(logs)
        seen.held, seen.deferred = list(held), self.averages.deferred
        parted = PartedTrace(seen, self._state(), self._most_samples)
        if parted.is_one_pass:
            return
        self.parted = parted
        once = set(parted.written_once)
        self.findings.once_an_update = [
            *self.findings.once_an_update,
            *(variable for variable in self._touched.variables if id(variable.handle) in once),
        ]

    def _state(self) -> list[Variable]:
        """Return the variables of metrics and seeds, which every micro-batch changes."""
        of_metrics = [variable for metric in self._model.metrics for variable in metric.variables]
        return [*of_metrics, *(variable for variable in self._touched.variables if is_state(variable))]

    @property
    def held_updates(self) -> Any:
        """The metrics' updates that are held back until the effective batch is through."""
        return self._held

    def look_at_losses(self) -> None:
        """Trace an eager step, without running the trace, to learn what its losses are made of.

        Raises:
            ValueError: the step computes with weights that it has updated before.
        """
        found = trial_trace(self._model, self._step, self._structure, self._touched)
        if found is None:
            return
        if self._sink is not None and len(found.seen.applied) > 1:
            self._is_one_pass = PartedTrace(found.seen, self._state(), self._most_samples).is_one_pass
            if not self._is_one_pass:
                raise no_parts_eagerly(self._model)
        self._told, self._count_length, self._learnt = found.told, found.count_length, found.findings
        if self._sink is not None:
            self.findings = found.findings

    def _run_averaging(self, leaves: list[Tensor], fraction: Tensor, totals: Tensor) -> tuple[Logs, list[Any], Any]:
        self._leaves = [] if tf.executing_eagerly() else leaves
        logs, held = self._run(leaves, fraction, totals)
        return logs, held, self.averages.statistics()

    def _run(self, leaves: list[Tensor], fraction: Tensor, totals: Tensor) -> tuple[Logs, list[Any]]:
        traced = TraceFindings()
        normalizer, terms = self._weighing(Mode.TRAIN, leaves, fraction, totals, traced)
        results = MetricResults()
        conditions: Conditions | None = None
        if not tf.executing_eagerly():
            graph = tf.compat.v1.get_default_graph()
            conditions = None if self._inlined is None else Conditions(graph, self._inlined)
            self._seen = StepTrace(graph, conditions=conditions)
        is_conditional = (lambda: False) if conditions is None else conditions.is_within
        scalar_metrics: list[str] = []
        untold_metrics: list[str] = []
        with (
            functions.functions_inlined(),
            self._capturing(fraction, traced),
            losses.intercept_reductions(normalizer),
            metrics.single_numbers_weighed(fraction, scalar_metrics.append, terms.weighed, untold_metrics.append),
            contextlib.nullcontext() if conditions is None else conditions.watched(),
            self._held.holding(leaves, fraction, is_conditional=is_conditional) as held,
            metrics.noting_results(results.note),
            gradients_weighed(terms.gradient, self._noting_gradients(traced)),
            losses.added_losses_noted(traced.note_added_loss),
            self._noting_draws(traced),
            self.averages.deferring(fraction, totals, is_conditional=is_conditional)
            if self._sink is not None
            else contextlib.nullcontext(),
        ):
            logs = results.with_values(self._step(self._structure.pack(leaves)))
        none_applied = not traced.applied and not self._found_in_branches()
        if self._sink is not None and self._model.trainable_variables and none_applied:
            raise ValueError(
                "train_step applied no Keras optimizer, so there are no gradients to accumulate. Give the gradients to "
                "the apply or apply_gradients of a keras.optimizers.Optimizer; one that has an apply set on the "
                "instance must be model.optimizer or an attribute of the model. "
                f"Received: {type(self._model).__name__}"
            )
        if self._sink is not None:
            traced.averaged_apart = self.averages.named_in(traced.differentiated)
            traced.once_an_update = self.averages.variables
            traced.note_end(logs)
            traced.forget_tensors()
            if self._learnt is not None:
                traced.take_over(self._learnt)
            traced.updated_in_parts = dict(self._held.updated_in_parts)
            traced.held_sample_bytes = self._held.sample_bytes
            if not traced.untold and not traced.comparing:  # otherwise the loss is named
                scalar_metrics += untold_metrics
            traced.scalar_metrics = tuple(
                name for name in dict.fromkeys(scalar_metrics) if name not in traced.updated_in_parts
            )
            self.findings = traced
            self._on_traced()
        batch = tf.nest.flatten([leaves, fraction, totals], expand_composites=True)
        logs = self.logs.note(logs, results, batch, terms, self._touched.variables if held else None)
        traced.loose_logs = self.logs.not_told if self._learnt is None else self._learnt.loose_logs
        self._count_length = normalizer.totals.length
        if self._seen is not None:
            self._seen.note_totals(normalizer.totals)
        return logs, held

    def _weighing(
        self, mode: Mode, leaves: list[Tensor], fraction: Tensor, totals: Tensor, traced: TraceFindings | None = None
    ) -> tuple[LossWeights, LossTerms | EagerTerms]:
        """Return what weighs the losses, and what follows them, in one trace or one eager run."""
        needed = Totals(mode, totals)
        if tf.executing_eagerly():
            normalizer = LossWeights(fraction, needed)
            eager = EagerTerms(self._told, fraction, int(sample_count(leaves)), normalizer.gradient_factor)
            normalizer.terms = eager
            return normalizer, eager
        note = (lambda found: None) if traced is None else traced.note_dependence
        return weighing(needed, leaves, fraction, note, flow_of(leaves, self._each))

    def _capturing(self, fraction: Tensor, traced: TraceFindings) -> contextlib.AbstractContextManager[None]:
        if self._sink is None:
            return contextlib.nullcontext()
        add = self._sink.capture(fraction)

        seen = self._seen

        def take(optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
            if seen is not None and seen.is_postponed(optimizer):
                return
            traced.note_applied(optimizer, gradients, variables)
            self.averages.note_applied()
            if seen is None:
                add(optimizer, gradients, variables)
            else:
                seen.note_applied(optimizer, gradients, variables, add)

        return capture_apply(self._touched.optimizers, take)

    def _noting_gradients(self, traced: TraceFindings) -> Callable[[Any, Any], None]:
        def note(target: Any, gradients: Any) -> None:
            traced.note_differentiated(target, gradients)
            if tf.executing_eagerly() and traced.applied and self._is_one_pass is None:
                raise no_parts_eagerly(self._model)

        return note

    def _noting_draws(self, traced: TraceFindings) -> contextlib.AbstractContextManager[None]:
        """Note the code that draws random numbers, in a trace and in the first micro-batch that runs eagerly."""
        if self._sink is None:
            return contextlib.nullcontext()
        if not tf.executing_eagerly():
            return draws.marked()
        traced.draws = self.findings.draws
        return draws.noted_eagerly(traced) if traced.draws is None else contextlib.nullcontext()

    def _run_counting(self, leaves: list[Tensor], fraction: Tensor, totals: Tensor) -> Any:
        normalizer, terms = self._weighing(Mode.COUNT, leaves, fraction, totals)
        results = MetricResults()
        with (
            functions.functions_inlined(),
            capture_apply(self._touched.optimizers, lambda *_: None),
            losses.intercept_reductions(normalizer),
            models.discarding_assignments(self._model),
            metrics.single_numbers_weighed(fraction, _ignored, terms.weighed),
            metrics.noting_results(results.note),
            without_gradients(terms.gradient),
            self._held.holding(leaves, fraction, discard=True),
        ):
            logs = self._step(self._structure.pack(leaves))
        if not tf.executing_eagerly():
            terms.weighed_logs(logs, self.logs.kinds)
        counted = normalizer.totals.counted
        self._count_length = normalizer.totals.length
        return tf.concat(counted, 0) if counted else tf.zeros([0], tf.float64)

    def count_over(self, leaves: list[Tensor], samples: Any, division: Division) -> Any:
        """Return the denominators of the effective batch: a float64 vector, empty if none depends on the data."""
        if self._count_length is None:  # an eager step has no trace that shows it: count the first micro-batch
            part = [cut(leaf, tf.constant(0, tf.int64), division.larger) for leaf in leaves]
            self._run_counting(part, tf.constant(1.0, tf.float64), tf.zeros([0], tf.float64))
        counts = tf.zeros([self._count_length], tf.float64)
        if not self._count_length:
            return counts
        return loop(
            leaves,
            samples,
            division,
            counts,
            lambda part, fraction, carried: carried + self._count_compiled(part, fraction, tf.zeros_like(counts)),
            each=self._each,
        )

    def empty(self) -> list[Any]:
        """Return what the loop starts with: logs, arguments of held metric updates and statistics of no samples."""
        held = self._held.empty()
        return [self.logs.empty(), [] if tf.executing_eagerly() else held, self.averages.empty()]

    def merge(self, carried: list[Any], results: tuple[Logs, list[Any], Any], fraction: Tensor) -> list[Any]:
        """Return what the loop carries, merged with the results of one more micro-batch."""
        logs, given, statistics = results
        return [
            self.logs.merged(carried[0], logs, fraction),
            self._held.push(carried[1], given),
            self.averages.merged(carried[2], statistics),
        ]

    def finish(self, carried: list[Any]) -> tuple[list[Any], Any]:
        """Update the metrics that were held back with the whole batch; return the final logs, and statistics."""
        parts, held, statistics = carried
        return (self.logs.as_of_now(parts) if self._held.finish(held) else parts), statistics


def _ignored(name: str) -> None:
    pass
