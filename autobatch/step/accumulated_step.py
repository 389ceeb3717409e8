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

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.metrics.merged_logs import Logs
from autobatch.step.accumulators import Accumulators, Update
from autobatch.step.compiled_step import CompiledStep
from autobatch.step.division import Divider, Division
from autobatch.step.micro_batch_loop import loop
from autobatch.step.micro_step import MicroStep
from autobatch.step.parted_step import PartedStep
from autobatch.step.whole_batch_step import WholeBatchStep
from autobatch.tensors.batch_structure import count_samples, sample_count
from autobatch.tensors.functions import called_directly
from autobatch.tensors.snapshots import InGraphSnapshot
from autobatch.types import Batch, ElementSpec, Model, Tensor, Variable


class AccumulatedStep(CompiledStep):
    """Compiled steps of one model on one device.

    ``effective_batch`` is the most samples in an update. If given, gradients of large embeddings are kept as rows.
    """

    def __init__(self, model: Model, element_spec: ElementSpec, *, effective_batch: int | None = None) -> None:
        super().__init__(model, element_spec)
        # A trial runs two full micro-batches; rounding can add one sample to the target.
        self._most_samples = None if effective_batch is None else effective_batch + 1
        self._sums = self._no_sums()
        self._whole = WholeBatchStep(model, self.structure, self._touched, self.update_room, self.note_update)
        self._ran_whole = False
        self._accumulate: Callable[..., Logs] | None = None
        self._apply: Callable[[], Any] | None = None
        self._evaluate: Callable[..., Logs] | None = None
        self._parted: PartedStep | None = None
        self._logs: Logs = {}
        self.train_divider, self.test_divider = Divider(model, effective_batch), Divider(model)

    def _no_sums(self) -> Accumulators:
        samples = self._most_samples
        return Accumulators(self.model, self.structure, self._touched, self.note_update, most_samples=samples)

    def for_data(self, element_spec: ElementSpec) -> AccumulatedStep:
        return AccumulatedStep(self.model, element_spec, effective_batch=self._most_samples)

    def prepare(self, *, whole: bool = False) -> bool:
        """Trace what :meth:`plain` needs if ``whole``, else what :meth:`accumulate` and :meth:`apply` need.

        Return True if anything was missing.
        """
        if whole:
            return self._whole.prepare()
        if self._apply is not None:
            return False
        self._sums.expect_rows()
        self._micro = micro = self._training_micro_step(self._sums, self._most_samples)
        if not self.model.run_eagerly:
            micro.trace()
        if micro.parted is not None:
            parted = PartedStep(
                self.model, self.structure, micro, micro.parted, self._sums, self.update_room, self._touched
            )
            micro.findings.held_sample_bytes += parted.kept_sample_bytes
            self._parted, self._accumulate, self._apply = parted, parted.accumulate, parted.apply
            return True
        self._accumulate = self._trace_loop(micro, zero_first=True)
        self._apply = self._trace_apply(micro)
        return True

    def prepare_evaluation(self) -> bool:
        if self._evaluate is not None:
            return False
        micro = self._evaluating_micro_step(self._most_samples)
        if not self.model.run_eagerly:
            micro.trace()
        self._evaluate = self._trace_loop(micro, zero_first=False)
        return True

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
        self.prepare()
        return None if self.model.run_eagerly or self._micro is None else self._micro.graph

    def release_accumulators(self) -> None:
        self._sums.release()
        self._release_micro_step()
        if self._parted is not None:
            self._parted.release()
        self._accumulate = self._apply = self._parted = None
        self._sums, self._logs = self._no_sums(), {}

    def plain(self, data: Batch) -> Logs:
        """Run Keras's own step on the whole effective batch; the update begins when every gradient is there."""
        self._ran_whole = True
        return self._whole.run(self.structure.leaves(data))

    def accumulate(self, data: Batch, micro_batch: int) -> Logs:
        self._ran_whole = False
        self._logs = {}
        samples = count_samples(data)
        if not self._sums.holds(samples):  # more samples than were announced: there is no room for their rows
            self._most_samples = None
            self.release_accumulators()
        self.prepare()
        assert self._accumulate is not None
        division = self.train_divider.tensor(samples, micro_batch)
        self._logs = self._accumulate(self.structure.leaves(data), division)
        return self._logs

    def apply(self) -> Logs:
        self.prepare()
        assert self._apply is not None
        applied = self._apply()
        return self._logs if self._parted is None else applied

    def _trace_apply(self, micro: MicroStep) -> Callable[[], Any]:
        def apply() -> None:
            updates = self._sums.updates
            with self.update_room.update_of([variable for update in updates for variable in update.variables]):
                for update in updates:
                    update.optimizer.apply(self._sums.gradients_of(update), update.variables)
            micro.averages.assign_after_update()

        if self.model.run_eagerly:
            return apply
        concrete = tf.function(apply, autograph=False, input_signature=[]).get_concrete_function()
        self._touched.note_graph(concrete.graph)
        return concrete  # type: ignore[no-any-return]

    def evaluate(self, data: Batch, micro_batch: int) -> Logs:
        self.prepare_evaluation()
        assert self._evaluate is not None
        division = self.test_divider.tensor(count_samples(data), micro_batch)
        self._logs = self._evaluate(self.structure.leaves(data), division)
        return self._logs

    def evaluation_logs(self) -> Logs:
        return self._logs

    def _trace_loop(self, micro: MicroStep, *, zero_first: bool) -> Callable[..., Logs]:
        def run(leaves: list[Tensor], vector: Any) -> Logs:
            with tf.device("CPU:0"):
                samples, division = sample_count(leaves), Division(*tf.unstack(vector))
            if zero_first:
                self._sums.zero(tf.cast(division.larger < 0, tf.float32))
            totals = micro.count_over(leaves, samples, division)

            def body(part: list[Any], fraction: Tensor, carried: list[Any]) -> list[Any]:
                return micro.merge(carried, micro(part, fraction, totals), fraction)

            logs, statistics = micro.finish(loop(leaves, samples, division, micro.empty(), body))
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
