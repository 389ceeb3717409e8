"""The accumulated step: an effective batch in, one optimizer update out.

The model's ``train_step``, Keras's or the user's, is traced once with the batch dimension left open and with the
optimizers' ``apply`` captured (:mod:`autobatch.step.micro_step`). The captured gradients, times the micro-batch's share
of the effective batch (:mod:`autobatch.losses.loss_weights`), are added up (:mod:`autobatch.step.accumulators`). A
``tf.while_loop`` runs the trace for each micro-batch, one at a time. Slices are cut on the host, so that only one
micro-batch is on the device. Then the real ``apply`` runs once. A step that applies optimizers more than once is
divided into parts (:mod:`autobatch.step.parted_step`). If one micro-batch is the whole effective batch, Keras's own
step runs, with nothing accumulated (:mod:`autobatch.step.whole_batch_step`). Nothing here handles running out of
memory: :mod:`autobatch.recovery.transaction` does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.errors import FixedBatchSizeError
from autobatch.metrics.merged_logs import Logs
from autobatch.seams.optimizers import gradients_already_reduced
from autobatch.step import fixed_size
from autobatch.step.accumulators import Accumulators, Update
from autobatch.step.compilations import Compilations
from autobatch.step.compiled_step import CompiledStep
from autobatch.step.division import Divider, Division
from autobatch.step.loop_model import LoopModel
from autobatch.step.micro_batch_loop import loop
from autobatch.step.micro_step import MicroStep
from autobatch.step.parted_step import PartedStep
from autobatch.step.step_trace import PartedTrace
from autobatch.step.whole_batch_step import WholeBatchStep
from autobatch.tensors.batch_structure import sample_count
from autobatch.tensors.functions import called_directly
from autobatch.tensors.snapshots import InGraphSnapshot
from autobatch.types import Batch, ElementSpec, Model, Tensor, Variable

logger = logging.getLogger(__name__)


class AccumulatedStep(CompiledStep):
    """Compiled steps of one model on one device.

    ``effective_batch`` is the most samples in an update. If given, gradients of large embeddings are kept as rows.
    ``every_batch`` is the number of samples in each effective batch, if all have as many as Keras knows beforehand.

    Code that asks for the number of samples as a Python number cannot be traced with that number left open. A trace
    with the size of the micro-batches is made for it instead, where all of them are equal: see :attr:`wants_size`.
    """

    def __init__(
        self,
        model: Model,
        element_spec: ElementSpec,
        *,
        effective_batch: int | None = None,
        every_batch: int | None = None,
    ) -> None:
        super().__init__(model, element_spec)
        self._effective_batch = effective_batch
        self._every_batch = every_batch
        self.wants_size = False
        """True if the step cannot be traced for micro-batches of any size, so that it is traced for one."""
        self._each: int | None = None
        self._evaluates: int | None = None
        self.evaluates_whole = False
        """True if validation batches cannot be cut, because the code holds a number of samples."""
        # A trial runs two full micro-batches; rounding can add one sample to the target.
        self._most_samples = None if effective_batch is None else effective_batch + 1
        self._sums = self._no_sums()
        self._whole = WholeBatchStep(
            model, self.structure, self._touched, self.update_room, self.note_update, self.summaries
        )
        self._ran_whole = False
        self._accumulate: Callable[..., Logs] | None = None
        self._apply: Callable[[], Any] | None = None
        self._evaluate: Callable[..., Logs] | None = None
        self._parted: PartedStep | None = None
        self._logs: Logs = {}
        self._compilations = Compilations(model)
        self.train_divider, self.test_divider = Divider(model, effective_batch), Divider(model)

    def _no_sums(self) -> Accumulators:
        samples = self._most_samples
        return Accumulators(self.model, self.structure, self._touched, self.note_update, most_samples=samples)

    def for_data(self, element_spec: ElementSpec) -> AccumulatedStep:
        return AccumulatedStep(self.model, element_spec, effective_batch=self._effective_batch)

    def renewed(self) -> AccumulatedStep:
        return AccumulatedStep(
            self.model,
            self.structure.given_spec,
            effective_batch=self._effective_batch,
            every_batch=self._every_batch,
        )

    def prepare(self, *, whole: bool = False, samples: int | None = None, micro_batch: int | None = None) -> bool:
        """Trace what :meth:`plain` needs if ``whole``, else what :meth:`accumulate` and :meth:`apply` need.

        ``samples`` and ``micro_batch`` are the sizes that will be run, as far as they are known.

        Return True if anything was missing.

        Raises:
            FixedBatchSizeError: the model's code works with another number of samples at a time alone.
        """
        if whole:
            with self._traced_as():
                every = self._every_batch
                is_new = self._whole.prepare(every or samples, every=every is not None)
            if is_new:
                self._compilations.forget("whole update")
            return is_new
        each = self._size_wanted(samples, micro_batch)
        if self._apply is None or each != self._each:
            wants_size = False
            try:
                self._trace_training(each, samples)
            except fixed_size.SizeWantedError:
                if samples is None or micro_batch is None:
                    raise
                wants_size = True
            if wants_size:
                self._trace_training(self._size_wanted(samples, micro_batch), samples)
            self._require_size(samples, micro_batch)
            return True
        self._sums.reserve()
        self._require_size(samples, micro_batch)
        return False

    def fitting_size(self, samples: int, micro_batch: int) -> int:
        """Return the micro-batch to cut ``samples`` by, so that all are equal where the code wants one size."""
        return fixed_size.largest_divisor(samples, micro_batch) if self.wants_size else micro_batch

    def _size_wanted(self, samples: int | None, micro_batch: int | None) -> int | None:
        if not self.wants_size:
            return None
        if samples is None or micro_batch is None:
            return self._each
        return self.fitting_size(samples, micro_batch)

    def _trace_training(self, each: int | None, samples: int | None) -> None:
        """Trace a micro-batch of ``each`` samples, or of any number; and the update."""
        if self._apply is not None:
            self.release_accumulators()
        try:
            with self._traced_as():
                self._sums.expect_rows()
                self._compilations.forget("micro-batch")
                self._micro = micro = self._training_micro_step(self._sums, self._most_samples, each)
                if not self.model.run_eagerly:
                    micro.trace()
                if micro.parted is None:
                    self._accumulate = self._trace_loop(micro, zero_first=True, each=each)
                    self._apply = self._trace_apply(micro)
                else:
                    self._run_in_parts(micro, micro.parted)
            self._each = each
        except Exception as error:
            self.release_accumulators()
            if self.model.run_eagerly or not fixed_size.may_want_the_size(error):
                raise
            if each is None and (self._every_batch is not None or isinstance(self.model, LoopModel)):
                self.wants_size = True
                raise fixed_size.SizeWantedError from error
            if each is not None and samples is not None and each < samples and self._runs_whole(samples):
                raise fixed_size.refusal(self.model, each, samples, fixed_size.place_of(error)) from error
            raise

    def _run_in_parts(self, micro: MicroStep, trace: PartedTrace) -> None:
        parted = PartedStep(self.model, self.structure, micro, trace, self._sums, self.update_room, self._touched)
        micro.findings.held_sample_bytes += parted.kept_sample_bytes
        self._parted, self._accumulate, self._apply = parted, parted.accumulate, parted.apply

    def _runs_whole(self, samples: int) -> bool:
        """Return True if the model's code can be traced with all samples at a time."""
        try:
            self.prepare(whole=True, samples=samples)
        except Exception as error:  # noqa: BLE001 - whatever the user's code raises
            logger.info("the step cannot be traced with %d samples at a time either: %r", samples, error)
            return False
        return True

    def _require_size(self, samples: int | None, micro_batch: int | None) -> None:
        """Refuse to cut a batch into micro-batches of another size than the traced step is written for."""
        found = None if self._micro is None else self._micro.fixed_size
        if found is None or samples is None or micro_batch is None:
            return
        larger, smaller, _ = self.train_divider.division(samples, micro_batch)
        if (larger, smaller) != (found.samples, found.samples):
            raise fixed_size.refusal(self.model, larger, found.samples, found.place)

    def explain(self, error: BaseException, samples: int, micro_batch: int) -> None:
        """Refuse the micro-batch, if a step failed because the model's code works with another size alone.

        Raises:
            FixedBatchSizeError: so it is; it names the user's line.
        """
        if not isinstance(error, tf.errors.InvalidArgumentError) or self.model.run_eagerly or self.wants_size:
            return
        each = self.train_divider.division(samples, micro_batch).larger
        if each >= samples:
            return
        probe = self.renewed()
        probe.trained_as, probe.wants_size = self.trained_as, True
        try:
            probe._trace_training(each, samples)
        except FixedBatchSizeError as found:
            raise found from error
        except Exception as other:  # noqa: BLE001 - then it has another reason
            logger.info("the step cannot be traced with %d samples at a time: %r", each, other)
        finally:
            probe.release_accumulators()

    def prepare_evaluation(self, samples: int | None = None, micro_batch: int | None = None) -> bool:
        """Trace what :meth:`evaluate` needs for a batch of these sizes; return True if anything was missing."""
        if self._evaluate is None and not self.wants_size:
            try:
                self._trace_evaluation(None)
                return True
            except Exception as error:
                if samples is None or self.model.run_eagerly or not fixed_size.may_want_the_size(error):
                    raise
                self.wants_size = True
        if not self.wants_size or samples is None or micro_batch is None:
            return False
        each = samples if self.evaluates_whole else self.fitting_size(samples, micro_batch)
        if self._evaluate is not None and self._evaluates in (each, samples):
            return False
        try:
            self._trace_evaluation(each)
        except Exception as error:
            if each == samples or not fixed_size.may_want_the_size(error):
                raise
            self._trace_evaluation(samples)  # as Keras would
        return True

    def evaluation_size(self, samples: int, micro_batch: int) -> int:
        """Return the size by which to cut a validation batch, once :meth:`prepare_evaluation` has seen its sizes."""
        if self.evaluates_whole:
            return samples
        return micro_batch if self._evaluates is None else self._evaluates

    def _trace_evaluation(self, each: int | None) -> None:
        self._compilations.forget("validation")
        with self._traced_as():
            micro = self._evaluating_micro_step(self._most_samples, each)
            if not self.model.run_eagerly:
                micro.trace()
            self._evaluate = self._trace_loop(micro, zero_first=False, each=each)
        self._evaluates = each
        self.evaluates_whole = self.evaluates_whole or micro.fixed_size is not None

    def computes_between_updates(self, *, whole: bool) -> bool:
        if not whole:
            return self._parted is not None
        return self._whole.updates > 1 or super().computes_between_updates(whole=True)

    def update_has_begun(self) -> bool:
        not_reached = self._ran_whole and self._whole.has_not_reached_update()
        return not not_reached and super().update_has_begun()

    @property
    def copies(self) -> InGraphSnapshot | None:
        return self._whole.copies

    @property
    def _updates(self) -> list[Update]:
        return self._sums.updates

    @property
    def accumulators(self) -> list[Variable]:
        return self._sums.variables

    @property
    def tables_kept_as_rows(self) -> list[Variable]:
        return [variable for variable in self.updated_variables if id(variable) in self._sums.tables_kept_as_rows]

    @property
    def least_accumulator_bytes(self) -> int:
        return self._sums.least_bytes

    @property
    def micro_graph(self) -> tf.Graph | None:
        """Graph of the forward and backward pass of one micro-batch; None for a model that runs eagerly."""
        if self._micro is None:
            self.prepare()
        return None if self.model.run_eagerly or self._micro is None else self._micro.graph

    def rest(self) -> bool:
        if self.model.run_eagerly:
            return False
        self._sums.rest()
        for part in (self._micro, self._whole, self._parted):
            if part is not None:
                part.rest()
        self._logs = {}
        for evaluation in self.evaluations.values():
            evaluation.rest()
        return True

    def release_accumulators(self) -> None:
        self._sums.release()
        self._release_micro_step()
        if self._parted is not None:
            self._parted.rest()
        self._accumulate = self._apply = self._parted = None
        self._sums, self._logs = self._no_sums(), {}

    def plain(self, data: Batch) -> Logs:
        """Run Keras's own step on the whole effective batch; the update begins when every gradient is there."""
        self._ran_whole = True
        samples, leaves = self.structure.count(data), self.structure.leaves(data)
        self.prepare(whole=True, samples=samples)
        self._compilations.announce("whole update", leaves, [samples])
        return self._whole.run(leaves)

    def accumulate(self, data: Batch, micro_batch: int) -> Logs:
        self._ran_whole = False
        self._logs = {}
        samples = self.structure.count(data)
        if not self._sums.holds(samples):  # more samples than were announced: there is no room for their rows
            self._most_samples = None
            self.release_accumulators()
        self.prepare(samples=samples, micro_batch=micro_batch)
        micro_batch = self.fitting_size(samples, micro_batch)
        assert self._accumulate is not None
        division, leaves = self.train_divider.tensor(samples, micro_batch), self.structure.leaves(data)
        self._compilations.announce("micro-batch", leaves, self.train_divider.sizes(samples, micro_batch))
        self._logs = self._accumulate(leaves, division)
        if self._micro is not None:
            self._micro.end_pass()
        return self._logs

    def apply(self) -> Logs:
        assert self._apply is not None
        applied = self._apply()
        return self._logs if self._parted is None else applied

    def _trace_apply(self, micro: MicroStep) -> Callable[[], Any]:
        def apply() -> None:
            updates = self._sums.updates
            variables = [variable for update in updates for variable in update.variables]
            reduced = gradients_already_reduced([update.optimizer for update in updates])
            with self.update_room.update_of(variables), reduced:
                for update in updates:
                    update.optimizer.apply(self._sums.gradients_of(update), update.variables)
            micro.averages.assign_after_update()

        if self.model.run_eagerly:
            return apply
        concrete = tf.function(apply, autograph=False, input_signature=[]).get_concrete_function()
        self._touched.note_graph(concrete.graph)
        return concrete  # type: ignore[no-any-return]

    def evaluate(self, data: Batch, micro_batch: int) -> Logs:
        samples = self.structure.count(data)
        self.prepare_evaluation(samples, micro_batch)
        assert self._evaluate is not None
        size, leaves = self.evaluation_size(samples, micro_batch), self.structure.leaves(data)
        division = self.test_divider.tensor(samples, size)
        self._compilations.announce("validation", leaves, self.test_divider.sizes(samples, size))
        self._logs = self._evaluate(leaves, division)
        return self._logs

    def evaluation_logs(self) -> Logs:
        return self._logs

    def _trace_loop(self, micro: MicroStep, *, zero_first: bool, each: int | None = None) -> Callable[..., Logs]:
        def run(leaves: list[Tensor], vector: Any) -> Logs:
            with tf.device("CPU:0"):
                samples, division = sample_count(leaves), Division(*tf.unstack(vector))
            if zero_first:
                self._sums.zero(tf.cast(division.larger < 0, tf.float32))
            totals = micro.count_over(leaves, samples, division)

            def body(part: list[Any], fraction: Tensor, carried: list[Any]) -> list[Any]:
                return micro.merge(carried, micro(part, fraction, totals), fraction)

            logs, statistics = micro.finish(loop(leaves, samples, division, micro.empty(), body, each=each))
            micro.averages.assign(statistics)
            return micro.logs.pack(logs)

        if self.model.run_eagerly:
            micro.look_at_losses()
            return run
        compiled = tf.function(
            run, autograph=False, input_signature=[self.structure.specs, tf.TensorSpec([3], tf.int64)]
        )
        self._touched.note_graph(compiled.get_concrete_function().graph)
        return called_directly(compiled)
