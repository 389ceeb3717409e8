"""The accumulated step on several replicas: each sums its own gradients, then one all-reduce, one update.

The effective batch is that of all replicas together. Each replica runs its micro-batches in a loop of its own, as many
as its samples need, with no collective inside: one that runs out of memory there leaves no other waiting. Every loss is
weighted by its share of the *whole* effective batch, so that the gradients of the replicas add up to the one of a
single device; they are added up once, before the optimizer sees them, so that clipping acts on what one device would
clip.

Under ``tf.distribute`` the weights are mirrored: a variable on each device, changed alike. The accumulators are plain
variables, one on each device. Running averages, BatchNormalization's statistics among them, advance once an update by
the statistics of the whole effective batch, put together from those of all replicas in the same all-reduce. Where they
cannot, BatchNormalization's are averaged over the replicas, so that all of them evaluate and save the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from autobatch.metrics.merged_logs import Logs, together
from autobatch.seams import losses, models, strategies
from autobatch.seams.optimizers import gradients_already_reduced
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.step.division import Division, evenly
from autobatch.step.micro_batch_loop import loop
from autobatch.step.micro_step import MicroStep
from autobatch.tensors.batch_structure import cut, sample_count
from autobatch.tensors.variables import components, distinct


class ReplicatedStep(AccumulatedStep):
    """The compiled steps of a model made under a strategy's scope, in this process.

    ``data`` below are this worker's samples; its replicas share them in equal parts. ``total`` counts the samples of
    all workers in the update, ``totals`` the denominators of all (:meth:`count`).
    """

    def __init__(self, model: Any, element_spec: Any, strategy: Any = None) -> None:
        super().__init__(model, element_spec)
        self.strategy = strategy or strategies.strategy_of(model)
        self.devices = strategies.devices_of(self.strategy)
        self.worker, self.workers = strategies.worker_of(self.strategy)
        self._by_replica: list[dict[int, Any]] = [{} for _ in self.devices]
        self._count: Callable[..., Any] | None = None
        self._update: Callable[..., Any] | None = None
        self._read_metrics: Callable[..., Any] | None = None
        self.metric_logs: dict[str, Any] | None = None
        self._pending: list[Any] = []
        self._statistics: list[Any] = []  # of running averages: for each of their states, what each replica here has
        self.replica_seconds: Any = None
        """The seconds that each replica here took for its last micro-batches: a float64 tensor; None before them."""

    def for_data(self, element_spec: Any) -> ReplicatedStep:
        return ReplicatedStep(self.model, element_spec, self.strategy)

    def prepare(self, *, whole: bool) -> bool:
        """Trace what :meth:`accumulate` and :meth:`apply` need; tell if anything was. ``whole`` makes no difference:

        Keras's own step would enter the collective before every replica is known to have come that far.
        """
        if self._update is not None:
            return False
        for variable in distinct(self.model.trainable_variables):
            self._make_accumulators(variable)
        self._micro = self._trace_micro(MicroStep(self, self.model.train_step, training=True), training=True)
        self._count, self._accumulate = self._trace_loops(self._micro, training=True)
        self._update = self._trace_update()
        return True

    def prepare_evaluation(self) -> bool:
        if self._evaluate is not None:
            return False
        self._micro = self._trace_micro(MicroStep(self, self.model.test_step, training=False), training=False)
        self._count, self._evaluate = self._trace_loops(self._micro, training=False)
        return True

    @property
    def variables(self) -> list[Any]:
        own = {id(variable) for accumulators in self._by_replica for variable in accumulators.values()}
        return [variable for variable in components(super().variables) if id(variable) not in own]

    @property
    def updated_variables(self) -> list[Any]:
        return components(super().updated_variables)

    def note_update(self, optimizer: Any, variables: list[Any]) -> None:
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
        super().note_update(optimizer, variables)

    @property
    def counts_needed(self) -> bool:
        """Whether the denominators depend on the data, so that they must be counted over all replicas."""
        assert self._micro is not None
        return bool(self._micro.count_length)

    def release_accumulators(self) -> None:
        for accumulators in self._by_replica:
            for accumulator in accumulators.values():
                with tf.device(accumulator.device):
                    empty = tf.zeros([0], accumulator.dtype)
                tf.raw_ops.AssignVariableOp(resource=accumulator.handle, value=empty)
        self._by_replica = [{} for _ in self.devices]
        self._count = self._micro = self._accumulate = self._update = None
        self._captured = []

    # -- running ------------------------------------------------------------------------------------------------------

    def count(self, data: Any, micro_batch: int) -> Any:
        """The denominators of this worker's samples: a float64 vector, to be summed over the workers."""
        assert self._count is not None
        return self._count(self.structure.leaves(data), tf.constant(micro_batch, tf.int64)).numpy()

    def accumulate(self, data: Any, micro_batch: int, *, total: float | None = None, totals: Any = None) -> Logs:
        """Sum the gradients of this worker's samples on each replica; no weight changes, no collective, no logs yet.

        Without ``total`` and ``totals`` every worker is taken to have the same samples as this one.
        """
        self.prepare(whole=False)
        assert self._accumulate is not None
        self._pending = self._run(self._accumulate, data, micro_batch, total, totals)
        self._reserve()
        return self._pending

    def _reserve(self) -> None:
        """Make sure, before any replica enters the collective, that each has room for the update's temporaries.

        These are the gradients side by side, their sums, and what the optimizer takes for its largest variable. The
        block is only taken from the allocator, not written to, and given back at once.
        """
        sizes = [
            accumulator.shape.num_elements() * accumulator.dtype.size for accumulator in self._by_replica[0].values()
        ]
        replicas = self.strategy.num_replicas_in_sync
        sizes += [replicas * parts[0].shape.num_elements() * parts[0].dtype.size for parts in self._statistics]
        kibibytes = -(-(2 * sum(sizes) + 2 * max(sizes, default=0)) // 2**10)
        for device in self.devices:
            with tf.device(device):
                tf.raw_ops.Empty(shape=[kibibytes, 2**10], dtype=tf.uint8)

    def evaluate(self, data: Any, micro_batch: int, *, total: float | None = None, totals: Any = None) -> Logs:
        """Run ``model.test_step`` over this worker's samples; :meth:`evaluation_logs` ends it."""
        self.prepare_evaluation()
        assert self._evaluate is not None
        self._pending = self._run(self._evaluate, data, micro_batch, total, totals)
        return self._pending

    def _run(self, function: Callable[..., Any], data: Any, micro_batch: int, total: Any, totals: Any) -> Any:
        leaves = self.structure.leaves(data)
        if total is None:
            total = float(sample_count(leaves)) * self.workers
        if totals is None:
            totals = self.count(data, micro_batch) * self.workers if self.counts_needed else []
        with tf.device("CPU:0"):
            size, whole = tf.constant(micro_batch, tf.int64), tf.constant(total, tf.float64)
            results = function(leaves, size, whole, tf.constant(totals, tf.float64))
        means, others, self.replica_seconds, self._statistics = results
        return means, others

    def apply(self) -> Logs:
        """Reduce the sums over all replicas and update the weights once; return the logs of the whole update."""
        self.prepare(whole=False)
        assert self._update is not None
        averaged, others = self._pending
        return self._finished(others, *self._update(averaged, self._statistics))

    def evaluation_logs(self) -> Logs:
        """The logs of all replicas after :meth:`evaluate`: a collective."""
        averaged, others = self._pending
        if self._read_metrics is None:
            self._read_metrics = tf.function(self._reduce_logs, autograph=False)
        return self._finished(others, *self._read_metrics(averaged))

    def _finished(self, others: list[Any], reduced: Any, results: list[Any], metric_logs: dict[str, Any]) -> Logs:
        assert self._micro is not None
        self.metric_logs = dict(metric_logs)
        sums, rest, whole = iter(tf.unstack(reduced)), iter(others), iter(results)
        parts = []
        for averaged, returned_by in zip(self._micro.logs.averaged, self._micro.logs.returned_by, strict=True):
            here = next(sums) if averaged else next(rest)
            parts.append(here if returned_by is None else next(whole))
        return self._micro.logs.pack(parts)

    # -- tracing ------------------------------------------------------------------------------------------------------

    def _trace_micro(self, micro: MicroStep, *, training: bool) -> MicroStep:
        """Trace one micro-batch on each replica, never to be run: this learns what the logs and the counts are."""
        scalars = tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)

        def once(leaves: list[Any], fraction: Any, totals: Any) -> Any:
            with losses.losses_unscaled():
                self.strategy.run(lambda: (micro(leaves, fraction, totals), 0)[1])
            return 0

        concrete = tf.function(once, autograph=False).get_concrete_function(self.structure.specs, *scalars)
        self.watch(concrete, micro_step=True)
        if training:
            self.drop_unused_accumulators(training)
        return micro

    def _trace_loops(self, micro: MicroStep, *, training: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def part_of(leaves: list[Any], micro_batch: Any) -> tuple[list[Any], Any, Division]:
            replica, replicas = strategies.replica_here(), len(self.devices)
            with tf.device("CPU:0"):
                samples = sample_count(leaves)
                start, stop = samples * replica // replicas, samples * (replica + 1) // replicas
                division = evenly(tf.maximum(stop - start, 1), micro_batch)  # a replica may have no sample at all
                return [cut(leaf, start, stop) for leaf in leaves], stop - start, division

        def count(leaves: list[Any], micro_batch: Any) -> Any:
            def on_replica() -> Any:
                part, samples, division = part_of(leaves, micro_batch)
                return tf.identity(micro.count_over(part, samples, division))

            with losses.losses_unscaled():
                return tf.add_n(self.strategy.experimental_local_results(self.strategy.run(on_replica)))

        def accumulate(leaves: list[Any], micro_batch: Any, total: Any, totals: Any) -> Any:
            def on_replica() -> Any:
                if training:
                    # A zero that is not known beforehand: of a constant one TensorFlow keeps a copy of each shape.
                    zero = tf.cast(micro_batch < 0, tf.float32)
                    for accumulator in self._by_replica[strategies.replica_here()].values():
                        accumulator.assign(tf.fill(accumulator.shape, tf.cast(zero, accumulator.dtype)))
                part, samples, division = part_of(leaves, micro_batch)
                with tf.device("CPU:0"):
                    share = tf.cast(samples, tf.float64) / total
                    with tf.control_dependencies([share]):
                        begun = tf.timestamp()

                def body(piece: list[Any], fraction: Any, carried: list[Any]) -> list[Any]:
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
            first = [together(parts, kind) for parts, kind in zip(local, kinds, strict=True)]
            taken = tf.stack(self.strategy.experimental_local_results(seconds))
            each = [self.strategy.experimental_local_results(state) for state in statistics]
            return tf.stack(self.strategy.experimental_local_results(means)), first, taken, each

        specs = self.structure.specs
        size = tf.TensorSpec([], tf.int64)
        scalars = tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)
        counting = tf.function(count, autograph=False, input_signature=[specs, size])
        running = tf.function(accumulate, autograph=False, input_signature=[specs, size, *scalars])
        self.watch(running.get_concrete_function())
        return counting, running

    def _trace_update(self) -> Callable[..., Any]:
        assert self._micro is not None
        averages = self._micro.averages

        def on_replica(averaged: Any, states: list[Any]) -> Any:
            replica, replicas = strategies.replica_here(), self.strategy.num_replicas_in_sync
            sums = self._by_replica[replica]
            once = {id(variable) for variable in averages.variables}
            statistics = [variable for variable in _moving_statistics(self.model) if id(variable) not in once]
            local = [
                *(sums[key].read_value() for key in sums),
                *(tf.cast(variable.value, tf.float32) / replicas for variable in statistics),
            ]
            own = [strategies.in_own_row(state[replica]) for state in states]
            reduced, *logs = self._reduce([*local, *own], averaged)
            averages.assign(averages.merged_rows(reduced[len(local) :], replicas))
            gradient_of = dict(zip(sums, reduced, strict=False))
            for optimizer, variables, present in self._captured:
                gradients = [
                    tf.cast(gradient_of[id(distinct([variable])[0])], distinct([variable])[0].dtype) if there else None
                    for variable, there in zip(variables, present, strict=True)
                ]
                optimizer.apply(gradients, variables)
            for variable, mean in zip(statistics, reduced[len(sums) : len(local)], strict=True):
                variable.assign(mean)
            averages.assign_after_update()
            return logs

        def update(averaged: Any, states: list[Any]) -> Any:
            begun = self.update_room.note_begun(True)
            # Replicas take turns while they are traced, so that this must not be theirs to undo.
            optimizers = [optimizer for optimizer, _, _ in self._captured]
            with tf.control_dependencies([begun]), gradients_already_reduced(optimizers):
                return self._first(self.strategy.run(on_replica, args=(averaged, states)))

        compiled = tf.function(update, autograph=False)
        states = [(spec,) * len(self.devices) for spec in averages.specs]
        self.watch(compiled.get_concrete_function(self._averaged_spec(), states))
        return compiled  # type: ignore[no-any-return]

    def _averaged_spec(self) -> Any:
        assert self._micro is not None
        return tf.TensorSpec([len(self.devices), sum(self._micro.logs.averaged)], tf.float64)

    def _reduce_logs(self, averaged: Any) -> Any:
        return self._first(self.strategy.run(lambda: self._reduce([], averaged)[1:]))

    def _first(self, nest: Any) -> Any:
        """What the first replica here has, of values that are the same on all."""
        return tf.nest.map_structure(lambda part: self.strategy.experimental_local_results(part)[0], nest)

    def _reduce(self, local: list[Any], averaged: Any) -> tuple[list[Any], Any, list[Any], dict[str, Any]]:
        """Sum over all replicas ``local``, the averaged logs and the state of the metrics: one all-reduce a dtype.

        The metrics' results follow: those in the logs, and those that ``fit`` asks the model for.
        """
        assert self._micro is not None
        replica = strategies.replica_here()
        returned_by = [one for one in self._micro.logs.returned_by if one is not None]
        metrics = [*self.model.metrics, *(metric for metric, _ in returned_by)]
        variables = _distinct_keras(variable for metric in metrics for variable in metric.variables)
        summed = [variable for variable in variables if variable.aggregation == "sum"]
        values = [*local, tf.cast(averaged[replica], tf.float32), *(variable.value for variable in summed)]
        results = all_reduce(values, self.devices[replica])
        totals = results[len(local) + 1 :]
        with keras.StatelessScope(state_mapping=list(zip(summed, totals, strict=True))):
            whole = [tf.convert_to_tensor(tf.nest.flatten(metric.result())[place]) for metric, place in returned_by]
            logs = type(self.model).get_metrics_result(self.model)
        return results[: len(local)], results[len(local)], whole, dict(logs)

    # -- accumulators -------------------------------------------------------------------------------------------------

    def _make_accumulators(self, variable: Any) -> None:
        dtype = tf.float32 if variable.dtype.size < 4 else variable.dtype
        for replica, device in enumerate(self.devices):
            with tf.device(device):
                self._by_replica[replica][id(variable)] = tf.Variable(
                    tf.zeros(variable.shape, dtype), trainable=False, name="autobatch_accumulator"
                )

    def accumulator_for(self, variable: Any) -> Any:
        return self._by_replica[strategies.replica_here()][id(distinct([variable])[0])]

    @property
    def accumulators(self) -> list[Any]:
        return [accumulator for accumulators in self._by_replica for accumulator in accumulators.values()]

    def drop_unused_accumulators(self, training: bool) -> None:
        used = {
            id(distinct([variable])[0])
            for _, variables, present in self._captured
            for variable, there in zip(variables, present, strict=True)
            if there
        }
        self._by_replica = [
            {key: value for key, value in accumulators.items() if key in used} for accumulators in self._by_replica
        ]


def _moving_statistics(model: Any) -> list[Any]:
    norms = [layer for layer in models.layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
    changing = [layer for layer in norms if layer.built and layer.trainable]
    return [variable for layer in changing for variable in (layer.moving_mean, layer.moving_variance)]


def _distinct_keras(variables: Any) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def all_reduce(values: list[Any], device: str) -> list[Any]:
    """Sum each over all replicas, those of one dtype in one all-reduce; ``device`` is the replica's own."""
    results: list[Any] = [None] * len(values)
    context = tf.distribute.get_replica_context()
    for dtype in dict.fromkeys(value.dtype for value in values):
        places = [place for place, value in enumerate(values) if value.dtype == dtype]
        # tf.distribute asks where each value is, which an argument of a function does not tell.
        with tf.device(device):
            placed = [tf.identity(values[place]) for place in places]
        for place, result in zip(places, context.all_reduce(tf.distribute.ReduceOp.SUM, placed), strict=True):
            results[place] = result
    return results
