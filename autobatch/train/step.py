"""The accumulated step: an effective batch in, one optimizer update out.

``model.train_step``, whoever wrote it, is traced once with the batch dimension left open and with the optimizers'
``apply`` captured; the captured gradients, times the micro-batch's share of the effective batch
(:mod:`autobatch.train.normalizer`), go by ``assign_add`` into accumulators. A ``tf.while_loop`` runs it for each
micro-batch, one at a time; slices are cut on the host, so that one micro-batch is on the device. Then the real
``apply`` runs once. Where one micro-batch is the whole effective batch, Keras's own step runs, with nothing
accumulated.

Nothing here knows about running out of memory: :mod:`autobatch.train.recovery` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from autobatch.train import keras_seams
from autobatch.train.normalizer import Mode, Normalizer
from autobatch.train.structure import Structure, cut, sample_count
from autobatch.trial.snapshot import distinct

Logs = Any
_SCALAR = tf.TensorSpec([], tf.float64)
_TOTALS = tf.TensorSpec([None], tf.float64)


class AccumulatedStep:
    """The compiled steps of one model on data of one structure.

    ``element_spec`` describes a batch, whatever its size: a nest of type specs. Everything is traced at its first use.
    """

    def __init__(self, model: Any, element_spec: Any) -> None:
        self.model = model
        self.structure = Structure(element_spec)
        self.optimizers = keras_seams.optimizers_of(model)
        self._accumulators: dict[int, Any] = {}
        self._captured: list[tuple[Any, list[Any], list[bool]]] = []
        self._micro: _MicroStep | None = None
        self._plain: Callable[..., Logs] | None = None
        self._accumulate: Callable[..., Logs] | None = None
        self._apply: Callable[[], None] | None = None
        self._evaluate: Callable[..., Logs] | None = None
        self._evaluation: _MicroStep | None = None
        self._touched: dict[int, Any] = {}

    @property
    def variables(self) -> list[Any]:
        """Every variable that a step traced so far can touch, accumulators apart."""
        own = [*self.model.variables]
        for metric in self.model.metrics:
            own.extend(metric.variables)
        for optimizer in self.optimizers:
            own.extend(optimizer.variables)
        own.extend(keras_seams.global_seed_variables())
        own.extend(self._touched.values())
        accumulators = {id(accumulator) for accumulator in self._accumulators.values()}
        return [variable for variable in distinct(own) if id(variable) not in accumulators]

    @property
    def updated_variables(self) -> list[Any]:
        """The variables that only the optimizers' update touches: trainable weights and the optimizers' own."""
        own = [*self.model.trainable_variables]
        for optimizer in self.optimizers:
            own.extend(optimizer.variables)
        return distinct(own)

    @property
    def accumulators(self) -> list[Any]:
        """The accumulators, in the order in which they were made; empty until a micro-batch was traced."""
        return list(self._accumulators.values())

    def release_accumulators(self) -> None:
        """Let go of the accumulators and of what was traced with them."""
        self._micro = self._accumulate = self._apply = None
        self._accumulators = {}
        self._captured = []

    # -- one effective batch as one micro-batch ---------------------------------------------------------------------

    def plain(self, data: Any) -> Logs:
        """Run Keras's own step on the whole effective batch; the update begins when every gradient is there."""
        if self._plain is None:
            self._plain = self._trace_plain()
        return self._plain(self.structure.leaves(data))

    def _trace_plain(self) -> Callable[..., Logs]:
        def update(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
            present = [gradient for gradient in gradients if gradient is not None]
            with tf.control_dependencies(tf.nest.flatten(present, expand_composites=True)):
                held = [None if gradient is None else tf.identity(gradient) for gradient in gradients]
                type(optimizer).apply(optimizer, held, variables)

        def step(leaves: list[Any]) -> Logs:
            with keras_seams.capture_apply(self.optimizers, update):
                return self.model.train_step(self.structure.pack(leaves))

        if self.model.run_eagerly:
            return lambda leaves: self.model.train_step(self.structure.pack(leaves))
        inner = tf.function(step, autograph=False, jit_compile=True) if self.model.jit_compile else step
        compiled = tf.function(inner, autograph=False, input_signature=[self.structure.specs])
        self._watch(compiled.get_concrete_function())
        return compiled  # type: ignore[no-any-return]

    # -- one effective batch as several micro-batches ---------------------------------------------------------------

    def accumulate(self, data: Any, micro_batch: int) -> Logs:
        """Sum the gradients of an effective batch, ``micro_batch`` samples at a time; no weight changes."""
        if self._accumulate is None:
            self._micro = _MicroStep(self, self.model.train_step, training=True)
            self._accumulate = self._trace_loop(self._micro, zero_first=True)
        return self._accumulate(self.structure.leaves(data), tf.constant(micro_batch, tf.int64))

    def apply(self) -> None:
        """Update the weights once with what :meth:`accumulate` summed."""
        if self._apply is None:
            self._apply = self._trace_apply()
        self._apply()

    def _trace_apply(self) -> Callable[[], None]:
        def apply() -> None:
            for optimizer, variables, present in self._captured:
                gradients = [
                    self._accumulators[id(distinct([variable])[0])].read_value() if is_present else None
                    for variable, is_present in zip(variables, present, strict=True)
                ]
                optimizer.apply(gradients, variables)

        if self.model.run_eagerly:
            return apply
        compiled = tf.function(apply, autograph=False, input_signature=[])
        self._watch(compiled.get_concrete_function())
        return compiled  # type: ignore[no-any-return]

    def evaluate(self, data: Any, micro_batch: int) -> Logs:
        """Run ``model.test_step`` over a batch, ``micro_batch`` samples at a time, with the metrics of the whole."""
        if self._evaluate is None:
            self._evaluation = _MicroStep(self, self.model.test_step, training=False)
            self._evaluate = self._trace_loop(self._evaluation, zero_first=False)
        return self._evaluate(self.structure.leaves(data), tf.constant(micro_batch, tf.int64))

    def _trace_loop(self, micro: _MicroStep, *, zero_first: bool) -> Callable[..., Logs]:
        def run(leaves: list[Any], micro_batch: Any) -> Logs:
            with tf.device("CPU:0"):
                samples = sample_count(leaves)
            if zero_first:
                for accumulator in self._accumulators.values():
                    accumulator.assign(tf.zeros_like(accumulator))
            totals = tf.zeros([0], tf.float64)
            if micro.count_length:
                totals = _loop(leaves, samples, micro_batch, tf.zeros([micro.count_length], tf.float64), micro.add_counts)

            def body(part: list[Any], fraction: Any, carried: list[Any]) -> list[Any]:
                return micro.merge_logs(carried, micro(part, fraction, totals), fraction)

            return micro.pack_logs(_loop(leaves, samples, micro_batch, micro.empty_logs(), body))

        micro.trace()
        if self.model.run_eagerly:
            return run
        compiled = tf.function(
            run, autograph=False, input_signature=[self.structure.specs, tf.TensorSpec([], tf.int64)]
        )
        self._watch(compiled.get_concrete_function())
        return compiled  # type: ignore[no-any-return]

    # -- accumulators -----------------------------------------------------------------------------------------------

    def _accumulator_for(self, variable: Any) -> Any:
        inner = distinct([variable])[0]
        if id(inner) not in self._accumulators:
            with tf.init_scope(), tf.device(inner.device):
                self._accumulators[id(inner)] = tf.Variable(
                    tf.zeros(inner.shape, inner.dtype), trainable=False, name="autobatch_accumulator"
                )
        return self._accumulators[id(inner)]

    def _capture_into_accumulators(self, fraction: Any) -> keras_seams.ApplyHandler:
        captured: list[tuple[Any, list[Any], list[bool]]] = []
        self._captured = captured

        def add(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
            if any(optimizer is known for known, _, _ in captured):
                raise ValueError(
                    "train_step applies the same optimizer more than once, so that there is no single update to "
                    "accumulate for. Apply it once with all gradients, or use one optimizer for each set of "
                    f"variables. Received: {optimizer.name!r}"
                )
            if not optimizer.built:
                with tf.init_scope():
                    optimizer.build(variables)
            captured.append((optimizer, variables, [gradient is not None for gradient in gradients]))
            for variable, gradient in zip(variables, gradients, strict=True):
                if gradient is None:
                    continue
                accumulator = self._accumulator_for(variable)
                scale = tf.cast(fraction, accumulator.dtype)
                if isinstance(gradient, tf.IndexedSlices):
                    scaled = tf.cast(gradient.values, accumulator.dtype) * scale
                    accumulator.scatter_add(tf.IndexedSlices(scaled, gradient.indices))
                else:
                    accumulator.assign_add(tf.cast(gradient, accumulator.dtype) * scale)

        return add

    def _watch(self, concrete: Any) -> None:
        for variable in concrete.graph.variables:
            self._touched.setdefault(id(variable), variable)


class _MicroStep:
    """``train_step`` or ``test_step`` on one micro-batch, traced once; and how its logs become the effective batch's."""

    def __init__(self, owner: AccumulatedStep, step: Callable[[Any], Logs], *, training: bool) -> None:
        self._owner = owner
        self._step = step
        self._training = training
        self._compiled: Callable[..., Logs] = self._run
        self._count_compiled: Callable[..., Any] = self._run_counting
        self._logs: Logs = None
        self._averaged: list[bool] = []
        self.count_length = 0

    def __call__(self, leaves: list[Any], fraction: Any, totals: Any) -> Logs:
        return self._compiled(leaves, fraction, totals)

    def trace(self) -> None:
        """Trace now, outside of any loop: this learns what the logs look like and whether counts are needed."""
        model = self._owner.model
        specs = self._owner.structure.specs
        if model.run_eagerly:
            self._trace_symbolically(specs)
            return
        self._compiled = tf.function(
            self._run, autograph=False, jit_compile=bool(model.jit_compile), input_signature=[specs, _SCALAR, _TOTALS]
        )
        concrete = self._compiled.get_concrete_function()  # type: ignore[attr-defined]
        self._logs = concrete.structured_outputs
        self._owner._watch(concrete)
        if self.count_length:
            self._count_compiled = tf.function(
                self._run_counting, autograph=False, input_signature=[specs, _SCALAR, _TOTALS]
            )

    def _trace_symbolically(self, specs: list[Any]) -> None:
        # Eager steps have no trace to learn from: trace one all the same, and throw it away.
        traced = tf.function(self._run, autograph=False, input_signature=[specs, _SCALAR, _TOTALS])
        self._logs = traced.get_concrete_function().structured_outputs

    def _run(self, leaves: list[Any], fraction: Any, totals: Any) -> Logs:
        owner = self._owner
        normalizer = Normalizer(Mode.TRAIN, fraction, totals)
        with (
            keras_seams.capture_apply(owner.optimizers, owner._capture_into_accumulators(fraction))
            if self._training
            else keras_seams.capture_apply((), lambda *_: None),
            keras_seams.intercept_reductions(normalizer, fraction),
        ):
            logs = self._step(owner.structure.pack(leaves))
        self.count_length = len(normalizer.counts)
        known = set(owner.model.get_metrics_result()) if isinstance(logs, dict) else set()
        self._averaged = _which_are_averaged(logs, known)
        return logs

    def _run_counting(self, leaves: list[Any], fraction: Any, totals: Any) -> Any:
        owner = self._owner
        normalizer = Normalizer(Mode.COUNT, fraction, totals)
        with (
            keras_seams.capture_apply(owner.optimizers, lambda *_: None),
            keras_seams.intercept_reductions(normalizer, fraction),
            keras_seams.discarding_assignments(owner.model),
        ):
            self._step(owner.structure.pack(leaves))
        return tf.stack(normalizer.counts)

    def add_counts(self, leaves: list[Any], fraction: Any, counts: Any) -> Any:
        """Add this micro-batch's denominators to ``counts``, a float64 vector."""
        return counts + self._count_compiled(leaves, fraction, tf.zeros([self.count_length], tf.float64))

    def empty_logs(self) -> list[Any]:
        """Zeros in the shape of the logs, to carry through the loop."""
        return [
            tf.zeros([0 if size is None else size for size in part.shape], part.dtype)
            for part in tf.nest.flatten(self._logs)
            if part is not None
        ]

    def merge_logs(self, carried: list[Any], logs: Logs, fraction: Any) -> list[Any]:
        """Results of metrics stand for all micro-batches so far; what is no metric is averaged, weighted."""
        parts = [part for part in tf.nest.flatten(logs) if part is not None]
        return [
            before + tf.cast(part, before.dtype) * tf.cast(fraction, before.dtype) if averaged else part
            for before, part, averaged in zip(carried, parts, self._averaged, strict=True)
        ]

    def pack_logs(self, parts: list[Any]) -> Logs:
        """The logs in the structure in which the step returned them."""
        remaining = iter(parts)
        flat = [None if part is None else next(remaining) for part in tf.nest.flatten(self._logs)]
        return tf.nest.pack_sequence_as(self._logs, flat)


def _which_are_averaged(logs: Logs, metric_names: Iterable[str]) -> list[bool]:
    if not isinstance(logs, dict):
        parts = [("", part) for part in tf.nest.flatten(logs) if part is not None]
    else:
        # tf.nest sorts a dict by its keys; so must this.
        parts = [(key, part) for key in sorted(logs) for part in tf.nest.flatten(logs[key]) if part is not None]
    return [
        name not in set(metric_names)
        and tf.convert_to_tensor(part).dtype.is_floating
        and tf.convert_to_tensor(part).shape.rank == 0
        for name, part in parts
    ]


def _loop(leaves: list[Any], samples: Any, micro_batch: Any, carried: Any, body: Callable[..., Any]) -> Any:
    """Run ``body(part, fraction, carried) -> carried`` for each micro-batch in turn."""

    def step(start: Any, carried: Any) -> tuple[Any, Any]:
        with tf.device("CPU:0"):
            stop = tf.minimum(start + micro_batch, samples)
            fraction = tf.cast(stop - start, tf.float64) / tf.cast(samples, tf.float64)
            part = [cut(leaf, start, stop) for leaf in leaves]
        return stop, body(part, fraction, carried)

    start = tf.constant(0, tf.int64)
    if tf.executing_eagerly():
        while int(start) < int(samples):
            start, carried = step(start, carried)
        return carried
    invariants = tf.nest.map_structure(lambda tensor: tf.TensorShape([None if d == 0 else d for d in tensor.shape]), carried)
    _, carried = tf.while_loop(
        lambda start, _: start < samples,
        step,
        (start, carried),
        shape_invariants=(start.shape, invariants),
        parallel_iterations=1,
    )
    return carried
