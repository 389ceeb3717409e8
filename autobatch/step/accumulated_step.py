"""The accumulated step: an effective batch in, one optimizer update out.

``model.train_step``, whoever wrote it, is traced once with the batch dimension left open and with the optimizers'
``apply`` captured; the captured gradients, times the micro-batch's share of the effective batch
(:mod:`autobatch.losses.loss_weights`), go by ``assign_add`` into accumulators. A ``tf.while_loop`` runs it for each
micro-batch, one at a time; slices are cut on the host, so that one micro-batch is on the device. Then the real
``apply`` runs once. Where one micro-batch is the whole effective batch, Keras's own step runs, with nothing
accumulated. Nothing here knows about running out of memory: :mod:`autobatch.recovery.transaction` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.differences.trace_findings import TraceFindings
from autobatch.graphs.writes import written_variables
from autobatch.metrics.merged_logs import Logs
from autobatch.seams import models
from autobatch.seams.functions import functions_inlined
from autobatch.seams.optimizers import ApplyHandler, apply_of, capture_apply
from autobatch.step.division import Divider, Division
from autobatch.step.embedding_rows import RowBuffer, tables_of
from autobatch.step.gradient_sums import Shares, add_to
from autobatch.step.micro_batch_loop import loop
from autobatch.step.micro_step import MicroStep
from autobatch.step.touched_variables import TouchedVariables
from autobatch.step.update_room import UpdateReserve, guessed_bytes
from autobatch.tensors.batch_structure import Structure, count_samples, sample_count
from autobatch.tensors.functions import called_directly
from autobatch.tensors.snapshots import InGraphSnapshot
from autobatch.tensors.variables import bytes_of, distinct


class AccumulatedStep:
    """The compiled steps of one model on data of one structure.

    ``element_spec`` describes a batch of any size, a nest of type specs. Everything is traced at its first use. With
    ``effective_batch``, the most samples in an update, large embeddings' gradients are kept as rows.
    """

    def __init__(self, model: Any, element_spec: Any, *, effective_batch: int | None = None) -> None:
        self.model = model
        self.structure = Structure(element_spec)
        self._touched = TouchedVariables(model)
        self._accumulators: dict[int, Any] = {}
        self._row_buffers: dict[int, RowBuffer] = {}
        # A trial runs two full micro-batches; rounding can add one sample to the target.
        self._most_samples = None if effective_batch is None else effective_batch + 1
        self._captured: list[tuple[Any, list[Any], list[bool]]] = []
        self._micro: MicroStep | None = None
        self._plain: Callable[..., Logs] | None = None
        self._ran_whole = False
        self.copies: InGraphSnapshot | None = None  # of what the plain step changes before its update
        self._accumulate: Callable[..., Logs] | None = None
        self._apply: Callable[[], Logs] | None = None
        self._evaluate: Callable[..., Logs] | None = None
        self.traced = TraceFindings()  # of the micro-step that was traced last
        self.on_traced: Callable[[], None] = lambda: None
        self.on_optimizer_found: Callable[[], None] = lambda: None  # and built, before it has updated anything
        self.update_room = UpdateReserve()
        self.train_divider, self.test_divider = Divider(model, effective_batch), Divider(model)

    def for_data(self, element_spec: Any) -> AccumulatedStep:
        """The steps of the same model on other data."""
        return AccumulatedStep(self.model, element_spec, effective_batch=self._most_samples)

    def prepare(self, *, whole: bool) -> bool:
        """Trace what :meth:`plain` (``whole``) or :meth:`accumulate` and :meth:`apply` need; tell if anything was.

        Tracing builds what is not built yet and runs nothing; afterwards :attr:`variables` is complete, but for eager
        models' optimizers that nobody knows of before they are applied.
        """
        missing = self._plain is None if whole else self._apply is None
        if whole and missing:
            self._plain = self._trace_plain()
        elif missing:
            self._make_row_buffers()
            self._micro = MicroStep(self, self.model.train_step, training=True, most_samples=self._most_samples)
            self._accumulate = self._trace_loop(self._micro, zero_first=True)
            self._apply = self._trace_apply(self._micro)
        return missing

    def prepare_evaluation(self) -> bool:
        """Trace what :meth:`evaluate` needs; tell if anything was."""
        if self._evaluate is not None:
            return False
        micro = MicroStep(self, self.model.test_step, training=False, most_samples=self._most_samples)
        self._evaluate = self._trace_loop(micro, zero_first=False)
        return True

    def update_has_begun(self) -> bool:
        """Whether the step that has just failed came as far as its update, so that weights may have changed."""
        not_reached = self._ran_whole and self.copies is not None and not self.copies.are_of_failed_call
        return not not_reached and self.update_room.has_begun()

    @property
    def optimizers(self) -> tuple[Any, ...]:
        """The optimizers known from the model, and those that a step was seen to apply."""
        return self._touched.optimizers

    @property
    def variables(self) -> list[Any]:
        """Every variable that a step traced so far can touch, accumulators apart."""
        return self._without_accumulators(self._touched.variables)

    @property
    def updated_variables(self) -> list[Any]:
        """The variables that an optimizer's update changes: trainable weights and the optimizers' own."""
        return self._touched.updated_variables

    @property
    def changed_before_update(self) -> list[Any]:
        """What a step can touch before its update or beside it: statistics, metrics, seeds, what a layer assigns."""
        before = {id(variable) for variable in self.variables_written_by_micro_steps}
        in_update = {id(variable) for variable in self.updated_variables} - before
        return [variable for variable in self.variables if id(variable) not in in_update]

    @property
    def update_room_bytes(self) -> int:
        """What the optimizers' temporaries need; a guess before an update was traced."""
        return self.update_room.bytes or guessed_bytes(distinct(self.model.trainable_variables))

    @property
    def variables_written_by_micro_steps(self) -> list[Any]:
        """What traced micro-steps write, accumulators apart; of the plain step, what it writes before its update."""
        return self._without_accumulators(self._touched.written_variables)

    def _without_accumulators(self, variables: list[Any]) -> list[Any]:
        own = {id(variable) for variable in (*self._accumulator_variables(), *self.update_room.variables)}
        return [variable for variable in variables if id(variable) not in own]

    def _accumulator_variables(self) -> list[Any]:
        rows = [variable for buffer in self._row_buffers.values() for variable in buffer.variables]
        return [*self.accumulators, *rows]

    @property
    def updating_optimizers(self) -> tuple[Any, ...]:
        """The optimizers that the traced step applies; before, all that it could apply."""
        return tuple(optimizer for optimizer, _, _ in self._captured) or self.optimizers

    @property
    def accumulators(self) -> list[Any]:
        """The accumulators, in the order in which they were made; empty until a micro-batch was traced."""
        return list(self._accumulators.values())

    @property
    def tables_kept_as_rows(self) -> list[Any]:
        """The embeddings' tables whose gradients are not summed but kept, a row for each token."""
        return [variable for variable in self.updated_variables if id(variable) in self._row_buffers]

    @property
    def least_accumulator_bytes(self) -> int:
        """What the accumulators will take at the least; known before anything is traced."""
        return bytes_of(self.model.trainable_variables) - bytes_of(self._possible_tables())

    @property
    def micro_graph(self) -> tf.Graph | None:
        """The traced forward and backward pass of one micro-batch; None for a model that runs eagerly."""
        self.prepare(whole=False)
        return None if self.model.run_eagerly or self._micro is None else self._micro.graph

    def release_accumulators(self) -> None:
        """Let go of the accumulators, of their memory, and of what was traced with them.

        TensorFlow's registry of gradient functions keeps a traced update, and the buffers that it names, for the life
        of the process; so the buffers are emptied first.
        """
        for accumulator in self._accumulators.values():
            tf.raw_ops.AssignVariableOp(resource=accumulator.handle, value=tf.zeros([0], accumulator.dtype))
        for buffer in self._row_buffers.values():
            buffer.release()
        self._touched.forget(self._accumulator_variables())
        if self._micro is not None:
            self._micro.release()
        self._micro = self._accumulate = self._apply = None
        self._accumulators, self._row_buffers, self._captured = {}, {}, []

    # -- one effective batch as one micro-batch ---------------------------------------------------------------------

    def plain(self, data: Any) -> Logs:
        """Run Keras's own step on the whole effective batch; the update begins when every gradient is there."""
        self._ran_whole = True
        if self.copies is not None:
            self.copies.forget()
        self.prepare(whole=True)
        assert self._plain is not None
        return self._plain(self.structure.leaves(data))

    def _trace_plain(self) -> Callable[..., Logs]:
        def update(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
            self.note_update(optimizer, variables)
            self.update_room.note_gradients(gradients, variables)
            present = [gradient for gradient in gradients if gradient is not None]
            with tf.control_dependencies(tf.nest.flatten(present, expand_composites=True)):
                held = [None if gradient is None else tf.identity(gradient) for gradient in gradients]
                # XLA allocates all that a compiled step needs before anything runs, and writes nothing before its end.
                with contextlib.nullcontext() if self.model.jit_compile else self.update_room.update_of(variables):
                    apply_of(optimizer)(held, variables)

        train_step = models.untraced(self.model.train_step)

        def step(leaves: list[Any]) -> Logs:
            with functions_inlined(), capture_apply(self.optimizers, update):
                return train_step(self.structure.pack(leaves))

        if self.model.run_eagerly:
            return step
        inner = tf.function(
            step, autograph=False, jit_compile=bool(self.model.jit_compile), input_signature=[self.structure.specs]
        ).get_concrete_function()
        self.watch(inner)
        self.copies = copies = InGraphSnapshot(written_variables(inner.graph, self.changed_before_update))

        def kept_step(leaves: list[Any]) -> Logs:
            with tf.control_dependencies([self.update_room.note_begun(False), copies.keep()]):
                return inner(leaves)

        compiled = tf.function(kept_step, autograph=False, input_signature=[self.structure.specs])
        call = called_directly(compiled)

        def run(leaves: list[Any]) -> Logs:
            with copies.around_call():
                return call(leaves)

        return run

    # -- one effective batch as several micro-batches ---------------------------------------------------------------

    def accumulate(self, data: Any, micro_batch: int) -> Logs:
        """Sum the gradients of an effective batch, ``micro_batch`` samples at a time; no weight changes."""
        self._ran_whole = False
        if self._row_buffers and self._most_samples is not None and count_samples(data) > self._most_samples:
            self.release_accumulators()  # more samples than was said: there is no room for so many rows
            self._most_samples = None
        self.prepare(whole=False)
        assert self._accumulate is not None
        division = self.train_divider.tensor(count_samples(data), micro_batch)
        return self._accumulate(self.structure.leaves(data), division)

    def apply(self) -> Logs:
        """Update the weights once with what :meth:`accumulate` summed; on several replicas, return the logs of all."""
        self.prepare(whole=False)
        assert self._apply is not None
        return self._apply()

    def _trace_apply(self, micro: MicroStep) -> Callable[[], Logs]:
        def apply() -> None:
            with self.update_room.update_of([variable for _, variables, _ in self._captured for variable in variables]):
                for optimizer, variables, present in self._captured:
                    gradients = [
                        self._accumulated(distinct([variable])[0]) if is_present else None
                        for variable, is_present in zip(variables, present, strict=True)
                    ]
                    optimizer.apply(gradients, variables)
            micro.averages.assign_after_update()

        if self.model.run_eagerly:
            return apply
        concrete = tf.function(apply, autograph=False, input_signature=[]).get_concrete_function()
        self.watch(concrete)
        return concrete  # type: ignore[no-any-return]

    def _accumulated(self, variable: Any) -> Any:
        if id(variable) in self._row_buffers:
            return self._row_buffers[id(variable)].gradient()
        value = self._accumulators[id(variable)].read_value()
        value.set_shape(variable.shape)
        return tf.cast(value, variable.dtype)

    def evaluate(self, data: Any, micro_batch: int) -> Logs:
        """Run ``model.test_step`` over a batch, ``micro_batch`` samples at a time, with the metrics of the whole."""
        self.prepare_evaluation()
        assert self._evaluate is not None
        return self._evaluate(self.structure.leaves(data), self.test_divider.tensor(count_samples(data), micro_batch))

    def _trace_loop(self, micro: MicroStep, *, zero_first: bool) -> Callable[..., Logs]:
        def run(leaves: list[Any], vector: Any) -> Logs:
            with tf.device("CPU:0"):
                samples, division = sample_count(leaves), Division(*tf.unstack(vector))
            if zero_first:
                # A zero that is not known beforehand: of a constant one TensorFlow keeps a copy of each shape.
                zero = tf.cast(division.larger < 0, tf.float32)
                for accumulator in self._accumulators.values():
                    accumulator.assign(tf.fill(tf.shape(accumulator), tf.cast(zero, accumulator.dtype)))
                for buffer in self._row_buffers.values():
                    buffer.clear()
            totals = micro.count_over(leaves, samples, division)

            def body(part: list[Any], fraction: Any, carried: list[Any]) -> list[Any]:
                return micro.merge(carried, micro(part, fraction, totals), fraction)

            logs, statistics = micro.finish(loop(leaves, samples, division, micro.empty(), body))
            micro.averages.assign(statistics)
            return micro.logs.pack(logs)

        if self.model.run_eagerly:
            micro.look_at_losses()
            return run
        micro.trace()
        compiled = tf.function(
            run, autograph=False, input_signature=[self.structure.specs, tf.TensorSpec([3], tf.int64)]
        )
        self.watch(compiled.get_concrete_function())
        return called_directly(compiled)

    # -- accumulators -----------------------------------------------------------------------------------------------

    def accumulator_for(self, variable: Any) -> Any:
        inner = distinct([variable])[0]
        if id(inner) not in self._accumulators:
            # Sums of 16-bit gradients are kept in 32 bits: else what a micro-batch adds is lost in what is there.
            dtype = tf.float32 if inner.dtype.size < 4 else inner.dtype
            # Beside a buffer of rows it takes no memory before the trace shows which of the two is used.
            beside_rows = id(inner) in self._row_buffers
            with tf.init_scope(), tf.device(inner.device):
                self._accumulators[id(inner)] = tf.Variable(
                    tf.zeros([0] if beside_rows else inner.shape, dtype),
                    shape=tf.TensorShape(None) if beside_rows else None,
                    trainable=False,
                    name="autobatch_accumulator",
                )
        return self._accumulators[id(inner)]

    def _possible_tables(self) -> list[Any]:
        if self._most_samples is None or self.model.jit_compile or self.model.run_eagerly:
            return []
        return tables_of(models.layers_of(self.model))

    def _make_row_buffers(self) -> None:
        for table in self._possible_tables():
            self._row_buffers[id(table)] = RowBuffer(table, tf.float32 if table.dtype.size < 4 else table.dtype)

    def drop_unused_accumulators(self, training: bool) -> None:
        """Let go of the accumulators of variables that got no gradient."""
        if not training:
            return
        used = {
            id(distinct([variable])[0])
            for _, variables, present in self._captured
            for variable, is_present in zip(variables, present, strict=True)
            if is_present
        }
        self._accumulators = {key: value for key, value in self._accumulators.items() if key in used}
        rows = {key: buffer for key, buffer in self._row_buffers.items() if buffer.rows_per_sample is not None}
        for variable in self.updated_variables:
            key = id(variable)
            if key in rows:
                assert self._most_samples is not None
                rows[key].reserve(self._most_samples)
                self._accumulators.pop(key, None)
            elif key in self._row_buffers and key in self._accumulators:
                self._accumulators[key].assign(tf.zeros(variable.shape, self._accumulators[key].dtype))
        self._row_buffers = rows

    def capture_into_accumulators(self, fraction: Any) -> ApplyHandler:
        captured: list[tuple[Any, list[Any], list[bool]]] = []
        self._captured = captured

        def add(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
            if any(optimizer is known for known, _, _ in captured):
                raise ValueError(
                    "train_step applies the same optimizer more than once, so that there is no single update to "
                    "accumulate for. Apply it once with all gradients, or use one optimizer for each set of "
                    f"variables. Received: {optimizer.name!r}"
                )
            self.note_update(optimizer, variables)
            shares = Shares(fraction)
            captured.append((optimizer, variables, [gradient is not None for gradient in gradients]))
            for variable, gradient in zip(variables, gradients, strict=True):
                if gradient is None:
                    continue
                accumulator = self.accumulator_for(variable)
                buffer = self._row_buffers.get(id(distinct([variable])[0]))
                if buffer is not None and self._keeps_rows(buffer, gradient):
                    buffer.add(gradient, shares.of(accumulator.dtype)[0])
                else:
                    add_to(accumulator, gradient, shares)

        return add

    def note_update(self, optimizer: Any, variables: list[Any]) -> None:
        """Note that a step applies an optimizer, known or not, to these variables."""
        if self._touched.note_update(optimizer, variables):
            self.on_optimizer_found()

    def _keeps_rows(self, buffer: RowBuffer, gradient: Any) -> bool:
        if not isinstance(gradient, tf.IndexedSlices) or self._most_samples is None:
            return False
        return buffer.takes(gradient, self.structure, self._most_samples)

    def watch(self, concrete: Any, *, micro_step: bool = False) -> None:
        self._touched.note_graph(concrete.graph)
        if micro_step:
            self._touched.note_written(concrete.graph)
