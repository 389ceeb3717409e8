"""Accumulated step on several replicas: each sums its own gradients, then come one all-reduce and one update.

The effective batch is that of all replicas together. Each replica runs as many micro-batches as its samples need, in a
loop of its own with no collective inside. A replica that runs out of memory there leaves no other waiting. Every loss
is weighted by its share of the *whole* effective batch, so that the gradients of the replicas add up to those of a
single device. They are added up once, before the optimizer sees them, so that clipping acts on what one device would
clip.

Under ``tf.distribute`` the weights are mirrored: a variable on each device, changed alike. The accumulators are plain
variables, one on each device. Running averages, BatchNormalization's statistics among them, advance once an update by
the statistics of the whole effective batch. The same all-reduce puts these together from all replicas. Where that
cannot be done, BatchNormalization's are averaged over the replicas, so that all evaluate and save the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from autobatch.metrics.merged_logs import Logs, of_all_replicas
from autobatch.replicas.accumulators import SumsByReplica
from autobatch.replicas.all_reduce import all_reduce
from autobatch.seams import losses, models, strategies
from autobatch.seams.optimizers import gradients_already_reduced
from autobatch.step.accumulators import Accumulators, Update
from autobatch.step.compiled_step import CompiledStep
from autobatch.step.division import Division, evenly
from autobatch.step.micro_batch_loop import loop
from autobatch.step.micro_step import MicroStep
from autobatch.tensors.batch_structure import cut, sample_count
from autobatch.tensors.variables import bytes_of, distinct
from autobatch.types import Batch, ElementSpec, Model, Optimizer, Strategy, Tensor, Variable


class _Compiled(NamedTuple):
    """Traced step on all replicas here: one micro-batch, the count of denominators, the loop over all samples."""

    micro: MicroStep
    count: Callable[..., Any]
    run: Callable[..., Any]


class ReplicatedStep(CompiledStep):
    """The compiled steps of a model made under a strategy's scope, in this process.

    ``data`` below are this worker's samples; its replicas share them in equal parts. ``total`` counts the samples of
    all workers in the update, ``totals`` the denominators of all (:meth:`count`).
    """

    def __init__(self, model: Model, element_spec: ElementSpec, strategy: Strategy = None) -> None:
        super().__init__(model, element_spec)
        self.strategy = strategy or strategies.strategy_of(model)
        self.devices = strategies.devices_of(self.strategy)
        self.worker, self.workers = strategies.worker_of(self.strategy)
        self._sums = self._no_sums()
        self._training: _Compiled | None = None
        self._evaluation: _Compiled | None = None
        self._prepared: _Compiled | None = None  # the one of the two that was prepared last
        self._update: Callable[..., Any] | None = None
        self._read_metrics: Callable[..., Any] | None = None
        self.metric_logs: dict[str, Any] | None = None
        self._pending: tuple[Any, list[Any]] | None = None
        self._statistics: list[Any] = []  # of running averages: for each state, the values on the replicas here
        self.replica_seconds: Any = None
        """Seconds that each replica here took for its last micro-batches: a float64 tensor; None before them."""

    def _no_sums(self) -> SumsByReplica:
        return SumsByReplica(
            [
                Accumulators(self.model, self.structure, self._touched, self.note_update, device=device)
                for device in self.devices
            ]
        )

    def for_data(self, element_spec: ElementSpec) -> ReplicatedStep:
        return ReplicatedStep(self.model, element_spec, self.strategy)

    def prepare(self) -> bool:
        """Trace what :meth:`accumulate` and :meth:`apply` need; return True if anything was missing.

        Keras's own step is not among it: it would enter the collective before every replica is known to have come that
        far.
        """
        missing = self._training is None
        if self._training is None:
            with self._traced_as():
                self._sums.expect(self.model.trainable_variables)
                self._micro = self._training_micro_step(self._sums)
                self._training = self._trace(self._micro)
                self._update = self._trace_update(self._micro)
        self._sums.reserve()
        self._prepared = self._training
        return missing

    def prepare_evaluation(self) -> bool:
        missing = self._evaluation is None
        if self._evaluation is None:
            self._evaluation = self._trace(self._evaluating_micro_step())
        self._prepared = self._evaluation
        return missing

    def note_update(self, optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
        """Refuse what cannot be updated on all replicas alike.

        Raises:
            ValueError: names the optimizer.
        """
        strategies.require_made_under(self.strategy, optimizer)
        trained = {id(variable) for variable in distinct(self.model.trainable_variables)}
        strangers = [variable.name for variable in distinct(variables) if id(variable) not in trained]
        if strangers:
            raise ValueError(
                f"Under {type(self.strategy).__name__} train_step can only update the model's own trainable weights: "
                f"make what it trains an attribute of the model. Received: {optimizer.name!r}, applied to "
                f"{', '.join(strangers)}"
            )
        super().note_update(optimizer, gradients, variables)

    @property
    def counts_needed(self) -> bool:
        """True if denominators of the step prepared last depend on the data: they are counted over all replicas."""
        assert self._prepared is not None
        return bool(self._prepared.micro.count_length)

    @property
    def accumulators(self) -> list[Variable]:
        return self._sums.variables

    @property
    def least_accumulator_bytes(self) -> int:
        return self._sums.of_each[0].least_bytes

    @property
    def _updates(self) -> list[Update]:
        return self._sums.updates

    def rest(self) -> bool:
        self._sums.rest()
        for compiled in (self._training, self._evaluation):
            if compiled is not None:
                compiled.micro.rest()
        self._pending, self._statistics, self.metric_logs, self.replica_seconds = None, [], None, None
        for evaluation in self.evaluations.values():
            evaluation.rest()
        return not self.model.run_eagerly

    def release_accumulators(self) -> None:
        self._sums.release()
        self._release_micro_step()
        self._training = self._prepared = self._update = self._pending = None
        self._sums = self._no_sums()

    # -- running ------------------------------------------------------------------------------------------------------

    def count(self, data: Batch, micro_batch: int) -> Any:
        """Return the denominators of this worker's samples: a float64 vector, to be summed over the workers."""
        assert self._prepared is not None
        return self._prepared.count(self.structure.leaves(data), tf.constant(micro_batch, tf.int64)).numpy()

    def accumulate(self, data: Batch, micro_batch: int, *, total: float | None = None, totals: Tensor = None) -> Any:
        """Sum the gradients of this worker's samples on each replica; no weight changes, no collective, no logs yet.

        Without ``total`` and ``totals`` every worker is taken to have as many samples as this one, and the same
        denominators.
        """
        self.prepare()
        ran = self._run(data, micro_batch, total, totals)
        self._reserve()
        return ran

    def _reserve(self) -> None:
        """Make sure, before any replica enters the collective, that each has room for the update's temporaries.

        The temporaries are the gradients side by side, their sums, and what the optimizer takes for its largest
        variable. The block is only taken from the allocator, not written to, and given back at once.
        """
        sizes = [bytes_of([accumulator]) for accumulator in self._sums.of_each[0].variables]
        replicas = self.strategy.num_replicas_in_sync
        sizes += [replicas * parts[0].shape.num_elements() * parts[0].dtype.size for parts in self._statistics]
        kibibytes = -(-(2 * sum(sizes) + 2 * max(sizes, default=0)) // 2**10)
        for device in self.devices:
            with tf.device(device):
                tf.raw_ops.Empty(shape=[kibibytes, 2**10], dtype=tf.uint8)

    def evaluate(self, data: Batch, micro_batch: int, *, total: float | None = None, totals: Tensor = None) -> Any:
        """Run ``model.test_step`` over this worker's samples; no collective, no logs yet."""
        self.prepare_evaluation()
        return self._run(data, micro_batch, total, totals)

    def _run(self, data: Batch, micro_batch: int, total: float | None, totals: Tensor) -> Any:
        assert self._prepared is not None
        leaves = self.structure.leaves(data)
        if total is None:
            total = float(sample_count(leaves)) * self.workers
        if totals is None:
            totals = self.count(data, micro_batch) * self.workers if self.counts_needed else []
        with tf.device("CPU:0"):
            size, whole = tf.constant(micro_batch, tf.int64), tf.constant(total, tf.float64)
            results = self._prepared.run(leaves, size, whole, tf.constant(totals, tf.float64))
        means, others, self.replica_seconds, self._statistics = results
        self._pending = means, others
        return self._pending

    def apply(self) -> Logs:
        """Reduce the sums over all replicas and update the weights once; return the logs of the whole update."""
        self.prepare()
        assert self._training is not None
        assert self._update is not None
        assert self._pending is not None
        averaged, others = self._pending
        return self._finished(self._training.micro, others, *self._update(averaged, self._statistics))

    def evaluation_logs(self) -> Logs:
        """Return the logs of all replicas after :meth:`evaluate`: a collective."""
        assert self._evaluation is not None
        assert self._pending is not None
        micro = self._evaluation.micro
        averaged, others = self._pending
        if self._read_metrics is None:
            self._read_metrics = tf.function(lambda averaged: self._reduce_logs(micro, averaged), autograph=False)
        return self._finished(micro, others, *self._read_metrics(averaged))

    def _finished(
        self, micro: MicroStep, others: list[Any], reduced: Any, results: list[Any], metric_logs: dict[str, Any]
    ) -> Logs:
        self.metric_logs = dict(metric_logs)
        sums, rest, whole = iter(tf.unstack(reduced)), iter(others), iter(results)
        parts = []
        for averaged, returned_by in zip(micro.logs.averaged, micro.logs.returned_by, strict=True):
            here = next(sums) if averaged else next(rest)
            parts.append(here if returned_by is None else next(whole))
        return micro.logs.pack(parts)

    # -- tracing ------------------------------------------------------------------------------------------------------

    def _trace(self, micro: MicroStep) -> _Compiled:
        self._trace_once(micro)
        return _Compiled(micro, *self._trace_loops(micro))

    def _trace_once(self, micro: MicroStep) -> None:
        """Trace one micro-batch on each replica, never to be run, to learn the logs and the counts."""
        scalars = tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)

        def once(leaves: list[Tensor], fraction: Tensor, totals: Tensor) -> Any:
            with losses.losses_unscaled():
                self.strategy.run(lambda: (micro(leaves, fraction, totals), 0)[1])
            return 0

        concrete = tf.function(once, autograph=False).get_concrete_function(self.structure.specs, *scalars)
        self._touched.note_graph(concrete.graph)
        self._touched.note_written(concrete.graph)
        if micro is self._micro:
            self._require_one_pass(micro)
            self._sums.settle()

    def _require_one_pass(self, micro: MicroStep) -> None:
        """Refuse a step that computes with weights that it has just updated.

        Raises:
            ValueError: names the strategy.
        """
        updated = [inner for update in self._sums.updates for inner in distinct(update.variables)]
        if micro.findings.sees_updates or len({id(inner) for inner in updated}) < len(updated):
            raise ValueError(
                f"Under {type(self.strategy).__name__} all updates of a train_step follow its last gradient, but this "
                "one computes with weights that it has just updated, or updates the same ones twice. Train it on one "
                "device, or take all gradients before the first apply. Received: "
                f"{type(self.model).__name__}"
            )

    def _trace_loops(self, micro: MicroStep) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def part_of(leaves: list[Tensor], micro_batch: Any) -> tuple[list[Any], Any, Division]:
            replica, replicas = strategies.replica_here(), len(self.devices)
            with tf.device("CPU:0"):
                samples = sample_count(leaves)
                start, stop = samples * replica // replicas, samples * (replica + 1) // replicas
                division = evenly(tf.maximum(stop - start, 1), micro_batch)  # a replica may have no sample at all
                return [cut(leaf, start, stop) for leaf in leaves], stop - start, division

        def count(leaves: list[Tensor], micro_batch: Any) -> Any:
            def on_replica() -> Any:
                part, samples, division = part_of(leaves, micro_batch)
                return tf.identity(micro.count_over(part, samples, division))

            with losses.losses_unscaled():
                return tf.add_n(self.strategy.experimental_local_results(self.strategy.run(on_replica)))

        def accumulate(leaves: list[Tensor], micro_batch: Any, total: Any, totals: Tensor) -> Any:
            def on_replica() -> Any:
                if micro is self._micro:
                    self._sums.here.zero(tf.cast(micro_batch < 0, tf.float32))
                part, samples, division = part_of(leaves, micro_batch)
                with tf.device("CPU:0"):
                    share = tf.cast(samples, tf.float64) / total
                    with tf.control_dependencies([share]):
                        begun = tf.timestamp()

                def body(piece: list[Any], fraction: Tensor, carried: list[Any]) -> list[Any]:
                    with tf.device("CPU:0"):
                        fraction = fraction * share
                    return micro.merge(carried, micro(piece, fraction, totals), fraction)

                with tf.control_dependencies([begun]):
                    logs, statistics = micro.finish(loop(part, samples, division, micro.empty(), body))
                with tf.device("CPU:0"), tf.control_dependencies([tf.identity(log) for log in logs]):
                    seconds = tf.timestamp() - begun  # what was copied to the host has been computed
                means = [tf.cast(log, tf.float64) for log, mean in zip(logs, micro.logs.averaged, strict=True) if mean]
                others = [log for log, mean in zip(logs, micro.logs.averaged, strict=True) if not mean]
                return tf.stack(means) if means else tf.zeros([0], tf.float64), others, seconds, statistics

            with losses.losses_unscaled():
                means, others, seconds, statistics = self.strategy.run(on_replica)
            kinds = [kind for kind, mean in zip(micro.logs.kinds, micro.logs.averaged, strict=True) if not mean]
            local = [self.strategy.experimental_local_results(part) for part in others]
            first = [of_all_replicas(parts, kind) for parts, kind in zip(local, kinds, strict=True)]
            taken = tf.stack(self.strategy.experimental_local_results(seconds))
            each = [self.strategy.experimental_local_results(state) for state in statistics]
            return tf.stack(self.strategy.experimental_local_results(means)), first, taken, each

        specs = self.structure.specs
        size = tf.TensorSpec([], tf.int64)
        scalars = tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)
        counting = tf.function(count, autograph=False, input_signature=[specs, size])
        running = tf.function(accumulate, autograph=False, input_signature=[specs, size, *scalars])
        self._touched.note_graph(running.get_concrete_function().graph)
        return counting, running

    def _trace_update(self, micro: MicroStep) -> Callable[..., Any]:
        averages, updates = micro.averages, self._sums.updates

        def on_replica(averaged: Tensor, states: list[Any]) -> Any:
            replica, replicas = strategies.replica_here(), self.strategy.num_replicas_in_sync
            sums = self._sums.here.sums()
            once = {id(variable) for variable in averages.variables}
            statistics = [variable for variable in _moving_statistics(self.model) if id(variable) not in once]
            local = [
                *sums.values(),
                *(tf.cast(variable.value, tf.float32) / replicas for variable in statistics),
            ]
            own = [strategies.in_own_row(state[replica]) for state in states]
            reduced, *logs = self._reduce(micro, [*local, *own], averaged)
            averages.assign(averages.merged_rows(reduced[len(local) :], replicas))
            reduced_sums = dict(zip(sums, reduced, strict=False))
            for update in updates:
                update.optimizer.apply(self._sums.here.gradients_of(update, reduced_sums), update.variables)
            for variable, mean in zip(statistics, reduced[len(sums) : len(local)], strict=True):
                variable.assign(mean)
            averages.assign_after_update()
            return logs

        def run(averaged: Tensor, states: list[Any]) -> Any:
            begun = self.update_room.note_begun(True)
            # Replicas take turns while they are traced, so none of them may undo this: it is done around them all.
            optimizers = [update.optimizer for update in updates]
            with tf.control_dependencies([begun]), gradients_already_reduced(optimizers):
                return self._first(self.strategy.run(on_replica, args=(averaged, states)))

        compiled = tf.function(run, autograph=False)
        states = [(spec,) * len(self.devices) for spec in averages.specs]
        spec = tf.TensorSpec([len(self.devices), sum(micro.logs.averaged)], tf.float64)
        self._touched.note_graph(compiled.get_concrete_function(spec, states).graph)
        return compiled  # type: ignore[no-any-return]

    def _reduce_logs(self, micro: MicroStep, averaged: Tensor) -> Any:
        return self._first(self.strategy.run(lambda: self._reduce(micro, [], averaged)[1:]))

    def _first(self, nest: Any) -> Any:
        """Return the first replica's part, among those here, of values that are the same on all."""
        return tf.nest.map_structure(lambda part: self.strategy.experimental_local_results(part)[0], nest)

    def _reduce(
        self, micro: MicroStep, local: list[Any], averaged: Tensor
    ) -> tuple[list[Any], Any, list[Any], dict[str, Any]]:
        """Sum over all replicas ``local``, the averaged logs and the state of the metrics: one all-reduce a dtype.

        The sums of ``local`` and of the logs are returned, then the metrics' results: those in the logs, and those that
        ``fit`` asks the model for.
        """
        replica = strategies.replica_here()
        returned_by = [one for one in micro.logs.returned_by if one is not None]
        metrics = [*self.model.metrics, *(metric for metric, _ in returned_by)]
        variables = {id(variable): variable for metric in metrics for variable in metric.variables}
        summed = [variable for variable in variables.values() if variable.aggregation == "sum"]
        values = [*local, tf.cast(averaged[replica], tf.float32), *(variable.value for variable in summed)]
        results = all_reduce(values, self.devices[replica])
        totals = results[len(local) + 1 :]
        with keras.StatelessScope(state_mapping=list(zip(summed, totals, strict=True))):
            whole = [tf.convert_to_tensor(tf.nest.flatten(metric.result())[place]) for metric, place in returned_by]
            logs = type(self.model).get_metrics_result(self.model)
        return results[: len(local)], results[len(local)], whole, dict(logs)


def _moving_statistics(model: Model) -> list[Any]:
    norms = [layer for layer in models.layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
    changing = [layer for layer in norms if layer.built and layer.trainable]
    return [variable for layer in changing for variable in (layer.moving_mean, layer.moving_variance)]
