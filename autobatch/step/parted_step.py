"""A step that applies optimizers more than once: its passes over the micro-batches, with the updates between them.

The step is traced once. Each pass runs, for every micro-batch, those of the traced operations that belong to it
(:mod:`autobatch.step.step_trace`), and sums its gradients up. Between two passes the real ``apply`` runs, and what the
step assigns without looking at the data. So every update is one of the effective batch, at its place, and what follows
it computes with the new weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from autobatch.averages import batch_statistics
from autobatch.graphs.parts import StepPart
from autobatch.graphs.replay import Replay, Source
from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.metrics.merged_logs import Logs
from autobatch.seams.optimizers import gradients_already_reduced
from autobatch.step.accumulators import Accumulators
from autobatch.step.division import Division
from autobatch.step.gradient_sums import Shares
from autobatch.step.micro_batch_loop import loop
from autobatch.step.micro_step import MicroStep
from autobatch.step.part_state import (
    PartState,
    empty_list,
    item_of,
    list_specs_of,
    next_index,
    specs_of,
    state_specs_of,
)
from autobatch.step.second_references import SecondReferences
from autobatch.step.step_trace import PartedTrace, SummedUpdate
from autobatch.step.update_room import UpdateReserve
from autobatch.tensors.batch_structure import Structure, sample_count
from autobatch.tensors.functions import called_directly
from autobatch.types import Model, Tensor


class PartedStep:
    """Compiled passes and updates of one model's step.

    Args:
        model: a compiled Keras model.
        structure: the structure of the data.
        micro: the traced micro-step.
        parted: its trace, divided.
        sums: sum the gradients.
        reserve: makes sure that the updates have their memory.
        touched: learns the variables that the traces show.
    """

    def __init__(
        self,
        model: Model,
        structure: Structure,
        micro: MicroStep,
        parted: PartedTrace,
        sums: Accumulators,
        reserve: UpdateReserve,
        touched: TouchedVariables,
    ) -> None:
        self._model = model
        self._structure = structure
        self._micro = micro
        self._parted = parted
        self._sums = sums
        self._reserve = reserve
        self._touched = touched
        self._source = Source(parted.trace.graph)
        self._parts = parted.make_parts(keeps_sizes=not model.jit_compile)
        sums.settle_units(parted.units)
        self._state = PartState(parted)
        self._references: dict[int, SecondReferences] = {}
        """Second references to what the micro-batches of a pass write, by its level; none without XLA."""
        levels = list(self._parts)
        last = max(interlude.level for interlude in parted.interludes if id(interlude) in parted.updates)
        self._runs = {level: self._trace_pass(level) if level % 2 else self._trace_between(level) for level in levels}
        self._before = [level for level in levels if level < last]
        self._rest = [level for level in levels if level >= last]
        self._finish = self._trace_finish()

    @property
    def kept_sample_bytes(self) -> int:
        """Bytes that are kept on the host for each sample from one pass to another."""
        kept = [tensor for part in self._parts.values() for tensor in part.to_each]
        of_samples = [each.shape[1:] for each in kept if each.shape.rank and each.shape[0] is None]
        sizes = [tensor.dtype.size for tensor in kept if tensor.shape.rank and tensor.shape[0] is None]
        return sum((shape.num_elements() or 0) * size for shape, size in zip(of_samples, sizes, strict=True))

    def accumulate(self, leaves: list[Tensor], division: Any) -> list[Any]:
        """Run everything that comes before the last update; return tensors that have a value once it has run."""
        self._state.begin(leaves, division)
        return [part for level in self._before for part in tf.nest.flatten(self._runs[level](self._state))]

    def apply(self) -> Logs:
        """Run the last update and what follows; return the logs of all micro-batches.

        The batch, and what was kept of it, is let go of.
        """
        for level in self._rest:
            self._runs[level](self._state)
        parts = self._finish(self._state.log_values(), self._state.held_lists())
        self._state = PartState(self._parted)
        return self._micro.logs.pack(parts)

    def rest(self) -> None:
        """Let go of the memory that is held between micro-batches; the traces are kept."""
        for each in self._references.values():
            each.drop()
        self._state = PartState(self._parted)

    def _trace_finish(self) -> Callable[[list[Any], list[Any]], list[Any]]:
        """Trace the update of the metrics that see the whole batch; it returns the final logs."""
        trace = self._parted.trace
        if not trace.held:
            return lambda logs, lists: logs

        def finish(logs: list[Any], lists: list[Any]) -> list[Any]:
            return self._micro.finish([logs, lists, None])[0]

        shapes = [[None, *log.shape[1:]] if log.shape.rank else log.shape for log in trace.logs]
        specs = [tf.TensorSpec(shape, log.dtype) for shape, log in zip(shapes, trace.logs, strict=True)]
        concrete = tf.function(
            finish, autograph=False, input_signature=[specs, list_specs_of(trace.held)]
        ).get_concrete_function()
        self._touched.note_graph(concrete.graph)
        return concrete  # type: ignore[no-any-return]

    # -- passes over the micro-batches --------------------------------------------------------------------------------

    def _trace_pass(self, level: int) -> Callable[[PartState], Any]:
        part, parted = self._parts[level], self._parted
        specs = self._structure.specs
        scalar, vector = tf.TensorSpec([], tf.float64), tf.TensorSpec([None], tf.float64)
        once, each = specs_of(part.from_once), specs_of(part.from_each)
        run_micro = self._compiled_micro(level, part, [specs, scalar, vector, once, each])
        count_micro = self._compiled_count(level, part, [specs, scalar, vector, once, each])
        log_places = [place for place, at in enumerate(parted.log_at) if at == level]
        held_places = [place for place, at in enumerate(parted.held_at) if at == level]
        layout = batch_statistics.layout_of(parted.statistics.get(level, []))
        logs, held = self._micro.logs, self._micro.held_updates
        begins = [place for place, unit in enumerate(parted.units) if unit.begin == level]

        def taken(lists: Sequence[Any], index: Any) -> list[Any]:
            with tf.device("CPU:0"):
                return [item_of(values, index, tensor) for values, tensor in zip(lists, part.from_each, strict=True)]

        def run(leaves: list[Tensor], sizes: Any, totals: Any, kept: list[Any], lists: list[Any]) -> Any:
            with tf.device("CPU:0"):
                samples, cut = sample_count(leaves), Division(*tf.unstack(sizes))
                first = tf.constant(0, tf.int64)
            self._sums.zero_units(tf.cast(cut.larger < 0, tf.float32), begins)
            if count_micro is not None:

                def count(piece: list[Any], fraction: Tensor, carried: list[Any]) -> list[Any]:
                    counted = count_micro(piece, fraction, totals, kept, taken(lists, carried[0]))
                    return [next_index(carried[0]), carried[1] + counted]

                totals = totals + loop(leaves, samples, cut, [first, tf.zeros_like(totals)], count)[1]

            def body(piece: list[Any], fraction: Tensor, carried: list[Any]) -> list[Any]:
                index, parts, parts_held, states, gives = carried
                given = run_micro(piece, fraction, totals, kept, taken(lists, index))
                own_logs, own_held, own_states, own_gives = given
                return [
                    next_index(index),
                    logs.merged_at(log_places, parts, own_logs, fraction),
                    held.push(parts_held, own_held),
                    batch_statistics.merged_statistics(layout, states, own_states),
                    held.push(gives, own_gives),
                ]

            start = [
                first,
                logs.empty_at(log_places),
                held.empty_at(held_places),
                batch_statistics.empty(layout),
                [empty_list(tensor) for tensor in part.to_each],
            ]
            _, *results = loop(leaves, samples, cut, start, body)
            return [totals, *results]

        signature = [specs, tf.TensorSpec([3], tf.int64), vector, once, list_specs_of(part.from_each)]
        compiled = tf.function(run, autograph=False, input_signature=signature)
        self._touched.note_graph(compiled.get_concrete_function().graph)
        call = called_directly(compiled)

        def run_pass(state: PartState) -> Any:
            kept, lists = state.once_values(part.from_once), state.each_values(part.from_each)
            totals, own_logs, own_held, own_states, gives = call(state.leaves, state.sizes, state.totals, kept, lists)
            if level in self._references:
                self._references[level].end_pass()
            state.totals = totals
            state.note_logs(log_places, own_logs)
            state.note_held(held_places, own_held)
            state.statistics[level] = own_states
            state.note_each(part.to_each, gives)
            return own_logs

        return run_pass

    def _compiled_micro(self, level: int, part: StepPart, signature: list[Any]) -> Callable[..., Any]:
        parted = self._parted
        statistics, conditions = parted.statistics.get(level, []), parted.levels.conditions
        units = [(place, unit) for place, unit in enumerate(parted.units) if unit.begin == level]

        def run(leaves: list[Tensor], fraction: Tensor, totals: Tensor, kept: list[Any], each: list[Any]) -> Any:
            replay = self._replay(part, [leaves, fraction, totals], kept, each)
            replay.run(part.operations, conditions)
            shares = Shares(fraction)
            for place, unit in units:
                self._sums.add_unit(place, replay.nest_of(unit.gradient), shares)
            own = [
                replace(one, parts=replay.nest_of(one.parts), weight=replay.nest_of(one.weight)) for one in statistics
            ]
            return (
                [replay.of(log) for log, at in zip(parted.trace.logs, parted.log_at, strict=True) if at == level],
                [replay.of(one) for one, at in zip(parted.trace.held, parted.held_at, strict=True) if at == level],
                batch_statistics.packed(own),
                [replay.of(tensor) for tensor in part.to_each],
            )

        compiled = tf.function(
            run, autograph=False, jit_compile=bool(self._model.jit_compile), input_signature=signature
        )
        concrete = compiled.get_concrete_function()
        self._touched.note_graph(concrete.graph)
        if not self._model.jit_compile:
            return compiled  # type: ignore[no-any-return]
        variables = [*self._touched.variables, *self._sums.variables]
        references = self._references[level] = SecondReferences(concrete.graph, variables)
        return references.held_for(compiled)

    def _compiled_count(self, level: int, part: StepPart, signature: list[Any]) -> Callable[..., Any] | None:
        parted = self._parted
        counted = [(total, own, at) for (total, own), at in zip(parted.trace.counted, parted.counted_at, strict=True)]
        if all(at != level for _, _, at in counted):
            return None
        operations = _behind([own for _, own, at in counted if at == level], part.operations)

        def count(leaves: list[Tensor], fraction: Tensor, totals: Tensor, kept: list[Any], each: list[Any]) -> Any:
            replay = self._replay(part, [leaves, fraction, totals], kept, each)
            stands_for = {id(total.op): (total, own) for total, own, at in counted if at == level}
            for operation in operations:
                if id(operation) in stands_for:
                    # The total is not known yet: as in a trace that counts, the micro-batch's own part stands for it.
                    total, own = stands_for[id(operation)]
                    replay.give(total, tf.reshape(replay.of(own), total.shape))
                else:
                    replay.run([operation], {})
            return tf.concat(
                [replay.of(own) if at == level else tf.zeros(own.shape, tf.float64) for _, own, at in counted], 0
            )

        return tf.function(count, autograph=False, input_signature=signature)  # type: ignore[no-any-return]

    def _replay(self, part: StepPart, arguments: list[Any], kept: list[Any], each: list[Any]) -> Replay:
        flat = tf.nest.flatten(arguments, expand_composites=True)
        given = dict(zip(map(id, self._source.arguments), flat, strict=True))
        given.update(zip(map(id, part.from_once), kept, strict=True))
        given.update(zip(map(id, part.from_each), each, strict=True))
        return Replay(self._source, given)

    def _apply(self, update: SummedUpdate) -> None:
        with gradients_already_reduced([update.optimizer]):
            update.optimizer.apply(self._sums.gradients_of_units(update.units), update.variables)

    # -- between passes -----------------------------------------------------------------------------------------------

    def _trace_between(self, level: int) -> Callable[[PartState], Any]:
        part, parted = self._parts[level], self._parted
        interludes = [interlude for interlude in parted.interludes if interlude.level == level]
        position, conditions = parted.levels.position, parted.levels.conditions
        known = [before for before in parted.statistics if before < level]
        log_places = [place for place, at in enumerate(parted.log_at) if at == level]

        def run(kept: list[Any], states: list[list[Any]]) -> Any:
            given = dict(zip(map(id, part.from_once), kept, strict=True))
            for before, state in zip(known, states, strict=True):
                given.update(batch_statistics.unpacked(parted.statistics[before], state))
            replay = Replay(self._source, given)
            waiting = list(part.operations)
            pending = list(interludes)
            while pending:
                interlude = pending.pop(0)
                first = [each for each in waiting if position[id(each)] < interlude.position]
                replay.run(first, conditions)
                waiting = waiting[len(first) :]
                if id(interlude) not in parted.updates:
                    deferred = parted.averages[id(interlude)]
                    deferred.variable.assign(tf.identity(replay.of(deferred.recipe.value)))
                    continue
                together = [parted.updates[id(interlude)]]
                until = position[id(waiting[0])] if waiting else None
                while pending and id(pending[0]) in parted.updates and (until is None or pending[0].position <= until):
                    together.append(parted.updates[id(pending.pop(0))])
                with self._reserve.update_of([variable for update in together for variable in update.variables]):
                    for update in together:
                        replay.run_if(update.holds, functools.partial(self._apply, update))
            replay.run(waiting, conditions)
            return (
                [tf.identity(replay.of(tensor)) for tensor in part.to_once],
                [tf.identity(replay.of(parted.trace.logs[place])) for place in log_places],
            )

        states = [state_specs_of(parted.statistics[before]) for before in known]
        concrete = tf.function(
            run, autograph=False, input_signature=[specs_of(part.from_once), states]
        ).get_concrete_function()
        self._touched.note_graph(concrete.graph)

        def run_between(state: PartState) -> Any:
            gives, logs = concrete(state.once_values(part.from_once), [state.statistics[before] for before in known])
            state.note_once(part.to_once, gives)
            state.note_logs(log_places, logs)
            return logs

        return run_between


def _behind(ends: Sequence[Any], operations: Sequence[Any]) -> list[Any]:
    """Return those of the operations that the ends are computed by, in their order."""
    among = {id(operation) for operation in operations}
    pending = [end.op for end in ends]
    found: set[int] = set()
    while pending:
        operation = pending.pop()
        if id(operation) in among and id(operation) not in found:
            found.add(id(operation))
            pending += [each.op for each in operation.inputs]
    return [operation for operation in operations if id(operation) in found]
