"""One micro-batch through ``train_step`` or ``test_step``, and the loop over the micro-batches of an update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from autobatch.train import keras_seams, metric_seams
from autobatch.train.graphs import written_variables
from autobatch.train.logs import Results
from autobatch.train.normalizer import Mode, Normalizer
from autobatch.train.running_averages import RunningAverages
from autobatch.train.structure import cut
from autobatch.train.traced import Traced
from autobatch.trial.snapshot import CopiesBeside

if TYPE_CHECKING:
    from autobatch.train.step import AccumulatedStep

Logs = Any
"""What a step returns: a nest of tensors, mostly a dictionary of scalars."""


class MicroStep:
    """``train_step`` or ``test_step`` on one micro-batch; and how its logs become those of the effective batch."""

    def __init__(self, owner: AccumulatedStep, step: Callable[[Any], Logs], *, training: bool) -> None:
        self._owner = owner
        self._step = keras_seams.untraced(step)
        self._training = training
        self.averages = RunningAverages(owner)
        """What is assigned once an update; nothing in an evaluation."""
        self._compiled: Callable[..., tuple[Logs, Any]] = self._run_averaging
        self._count_compiled: Callable[..., Any] = self._run_counting
        self._second_references: CopiesBeside | None = None
        self._logs: Logs = None
        self._averaged: list[bool] = []
        self._latest: list[Any] = []  # of the last micro-batch, where steps run eagerly
        self.returned_by: list[tuple[Any, int] | None] = []
        """For each part of the logs, the metric whose result it is and its place there; known once a step was run."""
        self._count_length: int | None = None
        self.graph: tf.Graph | None = None
        """What was traced; None before, and where the step runs eagerly."""

    @property
    def averaged(self) -> list[bool]:
        """Which parts of the logs are averaged over the micro-batches; known once a step was traced."""
        return self._averaged

    @property
    def count_length(self) -> int | None:
        """How many denominators depend on the data; known once a step was traced."""
        return self._count_length

    def __call__(self, leaves: list[Any], fraction: Any, totals: Any) -> tuple[Logs, Any]:
        """The logs of a micro-batch, and its statistics."""
        if self._second_references is None:
            return self._compiled(leaves, fraction, totals)
        with tf.control_dependencies([self._second_references.keep()]):
            return self._compiled(leaves, fraction, totals)

    def release(self) -> None:
        """Let go of what is held between micro-batches."""
        if self._second_references is not None:
            self._second_references.drop()
        self.averages.release()

    def trace(self) -> None:
        """Trace now, outside of any loop: this learns what the logs look like and whether counts are needed."""
        owner = self._owner
        specs = owner.structure.specs
        if self._training and len(owner.optimizers) == 1:
            # A tf.function that creates variables while it is traced is traced a second time.
            for variable in owner.model.trainable_variables:
                owner.accumulator_for(variable)
        signature = [specs, tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)]
        self._compiled = tf.function(
            self._run_averaging, autograph=False, jit_compile=bool(owner.model.jit_compile), input_signature=signature
        )
        concrete = self._compiled.get_concrete_function()  # type: ignore[attr-defined]
        self._logs, _ = concrete.structured_outputs
        self.graph = concrete.graph
        owner.watch(concrete, micro_step=True)
        owner.drop_unused_accumulators(self._training)
        if owner.model.jit_compile:
            # A step compiled by XLA that runs out of memory frees the buffers of the variables that it writes, although
            # they stay the variables', unless there is a second reference (TensorFlow 2.21 on a CPU).
            written = written_variables(concrete.graph, [*owner.variables, *owner.accumulators])
            self._second_references = CopiesBeside(written)
        self._count_compiled = tf.function(self._run_counting, autograph=False, input_signature=signature)

    def look_at_losses(self) -> None:
        """Learn which losses reduce the batch themselves where the step is not traced, without running it."""
        owner = self._owner
        if self._training and getattr(type(owner.model), "train_step", None) is keras.Model.train_step:
            normalizer = Normalizer(Mode.COUNT, 1.0, None)
            with keras_seams.intercept_reductions(normalizer):
                keras_seams.compute_symbolic_loss(owner.model, owner.structure.pack(owner.structure.specs))
            owner.traced.scalar_losses = normalizer.scalar_loss_names

    def _run_averaging(self, leaves: list[Any], fraction: Any, totals: Any) -> tuple[Logs, Any]:
        logs = self._run(leaves, fraction, totals)
        return logs, self.averages.statistics()

    def _run(self, leaves: list[Any], fraction: Any, totals: Any) -> Logs:
        owner = self._owner
        traced = Traced()
        normalizer = Normalizer(Mode.TRAIN, fraction, totals, traced.note_loss)
        results = Results()
        scalar_metrics: list[str] = []
        with (
            self._capturing(fraction, traced),
            keras_seams.intercept_reductions(normalizer),
            metric_seams.single_numbers_weighed(fraction, scalar_metrics.append),
            metric_seams.noting_results(results.note),
            keras_seams.vectors_differentiated(normalizer.gradient_factor, traced.note_differentiated),
            keras_seams.added_losses_noted(traced.note_added_loss),
            self.averages.deferring(fraction, totals) if self._training else contextlib.nullcontext(),
        ):
            logs = self._step(owner.structure.pack(leaves))
        if self._training and owner.model.trainable_variables and not traced.applied:
            raise ValueError(
                "train_step applied no Keras optimizer, so there are no gradients to accumulate. Give the gradients to "
                "the apply or apply_gradients of a keras.optimizers.Optimizer; one that has an apply set on the "
                "instance must be model.optimizer or an attribute of the model. "
                f"Received: {type(owner.model).__name__}"
            )
        self._count_length = len(normalizer.counts)
        if self._training:
            traced.averaged_apart = self.averages.named_in(traced.differentiated)
            traced.once_an_update = self.averages.variables
            traced.forget_tensors()
            # Where it is not traced, a loss has no name but the one that it had on symbolic inputs.
            named = owner.traced.scalar_losses if tf.executing_eagerly() else ()
            traced.scalar_losses = named or normalizer.scalar_loss_names
            traced.scalar_metrics = tuple(dict.fromkeys(scalar_metrics))
            owner.traced = traced
            owner.on_traced()
        batch = tf.nest.flatten([leaves, fraction, totals], expand_composites=True)
        self.returned_by = [results.returned_by(part) for _, part in _named_parts(logs)]
        averaged = [_is_scalar(part) and not results.holds(name, part, batch) for name, part in _named_parts(logs)]
        if self._averaged and tf.executing_eagerly():
            # What was no result once is none, though its value was a result's before.
            averaged = [now or before for now, before in zip(averaged, self._averaged, strict=True)]
        self._averaged = averaged
        self._logs = logs
        return logs

    def _capturing(self, fraction: Any, traced: Traced) -> contextlib.AbstractContextManager[None]:
        if not self._training:
            return contextlib.nullcontext()
        add = self._owner.capture_into_accumulators(fraction)

        def take(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
            traced.note_applied(optimizer, gradients)
            self.averages.note_applied()
            self._owner.update_room.note_gradients(gradients, variables)
            add(optimizer, gradients, variables)

        return keras_seams.capture_apply(self._owner.optimizers, take)

    def _run_counting(self, leaves: list[Any], fraction: Any, totals: Any) -> Any:
        owner = self._owner
        normalizer = Normalizer(Mode.COUNT, fraction, totals)
        with (
            keras_seams.capture_apply(owner.optimizers, lambda *_: None),
            keras_seams.intercept_reductions(normalizer),
            keras_seams.discarding_assignments(owner.model),
            keras_seams.without_gradients(),
        ):
            self._step(owner.structure.pack(leaves))
        self._count_length = len(normalizer.counts)
        return tf.stack(normalizer.counts) if normalizer.counts else tf.zeros([0], tf.float64)

    def count_over(self, leaves: list[Any], samples: Any, micro_batch: Any) -> Any:
        """The denominators of the effective batch: a float64 vector, empty where none depends on the data."""
        if self._count_length is None:  # an eager step has no trace to learn it from: count the first micro-batch
            stop = tf.minimum(micro_batch, samples)
            part = [cut(leaf, tf.constant(0, tf.int64), stop) for leaf in leaves]
            self._run_counting(part, tf.constant(1.0, tf.float64), tf.zeros([0], tf.float64))
        counts = tf.zeros([self._count_length], tf.float64)
        if not self._count_length:
            return counts
        return loop(
            leaves,
            samples,
            micro_batch,
            counts,
            lambda part, fraction, carried: carried + self._count_compiled(part, fraction, tf.zeros_like(counts)),
        )

    def empty(self) -> list[Any]:
        """What to carry through the loop: logs, and statistics of running averages, of no samples."""
        return [self.empty_logs(), self.averages.empty()]

    def merge(self, carried: list[Any], results: tuple[Logs, Any], fraction: Any) -> list[Any]:
        """What is carried, with the results of one more micro-batch."""
        logs, statistics = results
        return [self.merge_logs(carried[0], logs, fraction), self.averages.merged(carried[1], statistics)]

    def finished(self, carried: list[Any]) -> Logs:
        """The logs of the effective batch, whose running averages are assigned."""
        logs, statistics = carried
        self.averages.assign(statistics)
        return self.pack_logs(logs)

    def empty_logs(self) -> list[Any]:
        """Zeros in the shape of the logs, to carry through the loop; nothing where there was no trace to learn from."""
        if tf.executing_eagerly():
            self._averaged = []
        if self._logs is None or tf.executing_eagerly():
            return []
        return [
            tf.zeros([0 if size is None else size for size in part.shape], part.dtype)
            for part in tf.nest.flatten(self._logs)
            if part is not None
        ]

    def merge_logs(self, carried: list[Any], logs: Logs, fraction: Any) -> list[Any]:
        """Results of metrics stand for all micro-batches so far; what is no result is averaged, weighted."""
        parts = [tf.convert_to_tensor(part) for part in tf.nest.flatten(logs) if part is not None]
        carried = carried or [tf.zeros_like(part) for part in parts]
        summed = self._averaged
        if tf.executing_eagerly():  # it is the last micro-batch that shows which are results
            summed = [_is_scalar(part) for part in parts]
            self._latest = parts
        return [
            before + tf.cast(part, before.dtype) * tf.cast(fraction, before.dtype) if is_summed else part
            for before, part, is_summed in zip(carried, parts, summed, strict=True)
        ]

    def pack_logs(self, parts: list[Any]) -> Logs:
        """The logs in the structure in which the step returned them."""
        if self._latest:
            both = zip(parts, self._latest, self._averaged, strict=True)
            parts = [total if averaged else latest for total, latest, averaged in both]
            self._latest = []
        remaining = iter(parts)
        flat = [None if part is None else next(remaining) for part in tf.nest.flatten(self._logs)]
        return tf.nest.pack_sequence_as(self._logs, flat)


def _named_parts(logs: Logs) -> list[tuple[str, Any]]:
    """What is in the logs, each under the key of the dictionary that it is in."""
    if not isinstance(logs, dict):
        return [("", part) for part in tf.nest.flatten(logs) if part is not None]
    # tf.nest sorts a dict by its keys; so must this.
    return [(key, part) for key in sorted(logs) for part in tf.nest.flatten(logs[key]) if part is not None]


def _is_scalar(part: Any) -> bool:
    tensor = tf.convert_to_tensor(part)
    return bool(tensor.dtype.is_floating and tensor.shape.rank == 0)


def loop(leaves: list[Any], samples: Any, micro_batch: Any, carried: Any, body: Callable[..., Any]) -> Any:
    """Run ``body(part, fraction, carried) -> carried`` for each micro-batch in turn."""

    def step(start: Any, carried: Any) -> tuple[Any, Any]:
        with tf.device("CPU:0"):
            stop = tf.minimum(start + micro_batch, samples)
            fraction = tf.cast(stop - start, tf.float64) / tf.cast(samples, tf.float64)
            part = [cut(leaf, start, stop) for leaf in leaves]
        return stop, body(part, fraction, carried)

    with tf.device("CPU:0"):
        start = tf.constant(0, tf.int64)

    def more(start: Any, _: Any) -> Any:
        with tf.device("CPU:0"):  # a comparison on the device would wait for it at every micro-batch
            return start < samples

    if tf.executing_eagerly():
        while int(start) < int(samples):
            start, carried = step(start, carried)
        return carried
    invariants = tf.nest.map_structure(
        lambda tensor: tf.TensorShape([None if d == 0 else d for d in tensor.shape]), carried
    )
    _, carried = tf.while_loop(
        more,
        step,
        (start, carried),
        shape_invariants=(start.shape, invariants),
        parallel_iterations=1,
    )
    return carried
