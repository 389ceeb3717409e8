"""The trace of a step that applies optimizers more than once, and its division into parts.

:mod:`autobatch.graphs.levels` and :mod:`autobatch.graphs.parts` know graphs. Here it is said what an update, a running
average, a log and a counted total are to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf

from autobatch.averages.batch_statistics import Statistic
from autobatch.averages.running_averages import Deferred
from autobatch.graphs.levels import FIRST_PASS, Interlude, Levels, level_of_pass
from autobatch.graphs.parts import Parts, StepPart
from autobatch.losses.totals import Totals
from autobatch.seams.graph_functions import branch_around, loop_around
from autobatch.step.accumulators import Unit
from autobatch.step.conditions import Conditions
from autobatch.tensors.variables import components, distinct
from autobatch.types import Graph, Model, Optimizer, Tensor, Variable

UNKNOWN_SAMPLES = 1024
"""Samples assumed for an effective batch whose size is not known beforehand."""


@dataclass(eq=False, slots=True)
class Applied:
    """One call of an optimizer's ``apply`` in a trace; ``left_out`` are the operations that accumulate for it."""

    optimizer: Optimizer
    gradients: list[Any]
    variables: list[Any]
    left_out: range
    holds: Any = None
    """Tensor that is true if the update is to be made; None if it always is."""


@dataclass(slots=True)
class StepTrace:
    """Record of one micro-step's trace: its graph, and what the graph does not tell."""

    graph: Graph
    applied: list[Applied] = field(default_factory=list)
    counted: list[tuple[Any, Any]] = field(default_factory=list)
    """Pairs of a total of the effective batch and of the micro-batch's part of it, a vector."""
    deferred: list[Deferred] = field(default_factory=list)
    """Assignments to running averages, in their order."""
    logs: list[Any] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    conditions: Conditions | None = None
    """Conditions of the step, where branches that apply an optimizer can be inlined."""

    def is_postponed(self, optimizer: Optimizer) -> bool:
        """Return True if an ``apply`` is within a branch that is to be inlined in another trace.

        Raises:
            ValueError: it is within a loop that TensorFlow runs, or within a branch that cannot be inlined.
        """
        graph = tf.compat.v1.get_default_graph()
        if self.conditions is not None and not loop_around(graph, self.graph) and branch_around(graph, self.graph):
            return self.conditions.note_found()
        require_no_branch(optimizer, self.graph)
        return False

    def note_applied(
        self,
        optimizer: Optimizer,
        gradients: list[Any],
        variables: list[Any],
        add: Callable[..., None] = lambda *_: None,
    ) -> None:
        """Note an ``apply``; ``add``, called with the same arguments, may make operations that are no part of it."""
        require_no_branch(optimizer, self.graph)
        first = len(self.graph.get_operations())
        add(optimizer, gradients, variables)
        added = range(first, len(self.graph.get_operations()))
        holds = None if self.conditions is None else self.conditions.holds
        self.applied.append(Applied(optimizer, gradients, variables, added, holds))

    def note_totals(self, totals: Totals) -> None:
        """Note the totals that the losses and logs of the trace have asked for."""
        self.counted = list(zip(totals.given, totals.counted, strict=True))

    def note_results(self, logs: Any) -> None:
        """Note what the step has returned."""
        parts = tf.nest.flatten(logs)
        self.logs = [part for part in parts if getattr(part, "graph", None) is self.graph]


class SummedUpdate(NamedTuple):
    """One update of a step: for each variable the place of its sum among the units, None where it has no gradient."""

    optimizer: Optimizer
    variables: list[Any]
    units: list[int | None]
    holds: Any
    """Tensor of the trace that is true if the update is to be made; None if it always is."""


class PartedTrace:
    """A trace divided into parts, and what each of them does besides running operations.

    Args:
        trace: the trace.
        state: variables of metrics and seeds, which every micro-batch changes.
        samples: the most samples in an effective batch; None if not known.
    """

    def __init__(self, trace: StepTrace, state: Iterable[Variable], samples: int | None) -> None:
        self.trace = trace
        self._update_interludes = [
            Interlude(
                each.left_out.start, _parts_of(each.gradients), *_keys_of(each), after_pass=True, condition=each.holds
            )
            for each in trace.applied
        ]
        last = {id(each.variable): each for each in trace.deferred}
        finals = [each for each in trace.deferred if last[id(each.variable)] is each]
        self._average_interludes = [
            Interlude(each.position, [each.recipe.value], _handles([each.variable])) for each in finals
        ]
        self.averages = dict(zip(map(id, self._average_interludes), finals, strict=True))
        interludes = sorted(
            [*self._update_interludes, *self._average_interludes], key=lambda interlude: interlude.position
        )
        self.levels = Levels(
            trace.graph,
            interludes,
            left_out=[each.left_out for each in trace.applied],
            by_micro_batch=_handles(state),
            after={id(total.op): part for total, part in trace.counted},
            conditions=_guarded(trace),
        )
        self._require_conditions_of_the_step()
        self.units, self._unit_of = self._make_units()
        self.updates = {
            id(interlude): SummedUpdate(each.optimizer, each.variables, self._units_of(each), each.holds)
            for interlude, each in zip(self._update_interludes, trace.applied, strict=True)
        }
        self.interludes = interludes
        self.statistics: dict[int, list[Statistic]] = {}
        """Statistics of running averages, by the level of the pass that computes them."""
        for statistic in {id(one): one for each in trace.deferred for one in each.recipe.statistics}.values():
            self.statistics.setdefault(self._pass_of(_tensors_of(statistic)), []).append(statistic)
        self.counted_at = [self._pass_of([part]) for _, part in trace.counted]
        self.held_at = [self._pass_of([part]) for part in trace.held]
        self.log_at = [self._level_of_log(part) for part in trace.logs]
        """Level of each log: odd if it is merged over the micro-batches, even if it is the same for all."""
        self._samples = samples or UNKNOWN_SAMPLES

    def _require_conditions_of_the_step(self) -> None:
        """Refuse updates in a branch that is chosen by the data, and effects in such a branch that have results.

        Raises:
            ValueError: names the optimizer, or the operation.
        """
        for each in self.trace.applied:
            if each.holds is not None and self.levels.is_of_micro_batch(each.holds.op):
                raise ValueError(
                    "train_step applies an optimizer within a branch that is chosen by the data, so that each "
                    "micro-batch would choose by its own samples. Choose by a variable, or by optimizer.iterations. "
                    "Received: "
                    f"{each.optimizer.name!r}"
                )
        for operation in self.levels.operations:
            if id(operation) in self.levels.conditions and operation.outputs:
                raise ValueError(
                    "A branch of train_step that applies an optimizer also runs an operation with effects and results, "
                    "which cannot be run under the branch's condition alone. Move it out of the branch. Received: "
                    f"{operation.type} ({operation.name})"
                )

    # -- what one level does ------------------------------------------------------------------------------------------

    def make_parts(self, *, keeps_sizes: bool) -> dict[int, StepPart]:
        """Return the parts by their levels, in order; see :class:`.parts.Parts` for ``keeps_sizes``."""
        ends: dict[int, list[Any]] = {}

        def end(level: int, tensors: Iterable[Any]) -> None:
            ends.setdefault(level, []).extend(tensors)

        for unit in self.units:
            end(unit.begin, _parts_of([unit.gradient]))
        for interlude in self.interludes:
            end(interlude.level, [] if id(interlude) in self.updates else interlude.tensors)
            if interlude.condition is not None:
                end(interlude.level, [interlude.condition])
        for level, statistics in self.statistics.items():
            end(level, (tensor for each in statistics for tensor in _tensors_of(each)))
        for places, tensors in (
            (self.counted_at, [part for _, part in self.trace.counted]),
            (self.held_at, self.trace.held),
            (self.log_at, self.trace.logs),
        ):
            for level, tensor in zip(places, tensors, strict=True):
                end(level, [tensor])
        value_at = {id(each.recipe.value): self.levels.of(each.recipe.value) for each in self.trace.deferred}
        whole = {key: level + level % 2 for key, level in value_at.items()}
        known = [id(tensor) for each in self.statistics.values() for one in each for tensor in one.parts]
        parts = Parts(self.levels, ends, whole=whole, statistics=known, samples=self._samples, keeps_sizes=keeps_sizes)
        return dict(sorted(parts.by_level.items()))

    @property
    def is_one_pass(self) -> bool:
        """True if all updates can follow one pass, and nothing that the step does sees any of them."""
        levels = self.levels
        if any(each.holds is not None for each in self.trace.applied):
            return False
        summed = [place for update in self.updates.values() for place in update.units if place is not None]
        if len({id(self.units[place].variable) for place in summed}) < len(summed):
            return False
        if any(level > FIRST_PASS for level in (*self.counted_at, *self.held_at, *self.log_at, *self.statistics)):
            return False
        if any(unit.begin > FIRST_PASS for unit in self.units):
            return False
        for operation in levels.operations:
            if levels.access(operation).must_run:
                seen = max((levels.of(taken) for taken in operation.inputs), default=0)
                if seen > FIRST_PASS or levels.level_of(operation) > FIRST_PASS + 1:
                    return False
        return True

    @property
    def written_once(self) -> list[int]:
        """Keys of the variables that the step assigns once for all micro-batches."""
        levels = self.levels
        by_all = [levels.access(each) for each in levels.operations if not levels.is_of_micro_batch(each)]
        return [key for access in by_all for key in access.writes if key not in levels.by_micro_batch]

    def _pass_of(self, tensors: Iterable[Any]) -> int:
        return level_of_pass(max((self.levels.of(each) for each in tensors), default=0))

    def _level_of_log(self, part: Any) -> int:
        differs = self.levels.is_of_micro_batch(part.op)
        return level_of_pass(self.levels.of(part)) if differs else self.levels.of(part)

    def _make_units(self) -> tuple[list[Unit], dict[tuple[int, int], int]]:
        found: dict[tuple[int, int], list[Any]] = {}
        for interlude, each in zip(self._update_interludes, self.trace.applied, strict=True):
            for variable, gradient in zip(each.variables, each.gradients, strict=True):
                if gradient is not None:
                    (inner,) = distinct([variable])
                    known = found.setdefault((id(inner), id(gradient)), [inner, gradient, 0])
                    known[2] = max(known[2], interlude.level)
        free: dict[int, list[int]] = {}
        units: list[Unit] = []
        place_of: dict[tuple[int, int], int] = {}
        begins = {key: self._pass_of(_parts_of([each[1]])) for key, each in found.items()}
        for key in sorted(found, key=lambda key: begins[key]):
            inner, gradient, end = found[key]
            ends = free.setdefault(id(inner), [])
            slot = next((place for place, busy in enumerate(ends) if busy < begins[key]), len(ends))
            ends[slot : slot + 1] = [end]
            place_of[key] = len(units)
            units.append(Unit(inner, gradient, begins[key], slot))
        return units, place_of

    def _units_of(self, applied: Applied) -> list[int | None]:
        return [
            None if gradient is None else self._unit_of[id(distinct([variable])[0]), id(gradient)]
            for variable, gradient in zip(applied.variables, applied.gradients, strict=True)
        ]


def _parts_of(gradients: Sequence[Any]) -> list[Any]:
    present = [gradient for gradient in gradients if gradient is not None]
    return [part for part in tf.nest.flatten(present, expand_composites=True) if hasattr(part, "graph")]


def _tensors_of(statistic: Statistic) -> list[Tensor]:
    weight = statistic.weight
    return [*statistic.parts, *([weight] if tf.is_tensor(weight) and hasattr(weight, "graph") else [])]


def _guarded(trace: StepTrace) -> dict[int, Any]:
    """Return, for the operations of inlined branches, by their ids, the tensor that is true if they are chosen."""
    found: dict[int, Any] = {}
    operations = trace.graph.get_operations()
    for guard in [] if trace.conditions is None else trace.conditions.guards:
        for position in guard.operations:
            found.setdefault(id(operations[position]), guard.holds)
    return found


def _handles(variables: Iterable[Variable]) -> tuple[int, ...]:
    return tuple(id(variable.handle) for variable in components(variables))


def _keys_of(applied: Applied) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the keys of the variables that an update changes, and of learning rates, which it reads alone."""
    inner = getattr(applied.optimizer, "inner_optimizer", None)
    owners = [one for one in (applied.optimizer, inner) if one is not None]
    own = [variable for owner in owners for variable in owner.variables]
    rates = [variable for variable in own if variable.name == "learning_rate"]
    changed = [variable for variable in own if all(variable is not rate for rate in rates)]
    return _handles([*applied.variables, *changed]), _handles(rates)


def is_state(variable: Variable) -> bool:
    """Return True if a variable is a seed or a metric's sum."""
    is_seed = "seed_generator_state" in str(variable.name) or str(variable.name).startswith("StateVar")
    return is_seed or bool(variable.aggregation == tf.VariableAggregation.SUM)


def require_no_branch(optimizer: Optimizer, step: Graph) -> None:
    """Refuse an ``apply`` within a loop that TensorFlow runs, or within a branch that it chooses.

    Raises:
        ValueError: the current graph is that of a loop or a branch in the graph of the step.
    """
    graph = tf.compat.v1.get_default_graph()
    if loop_around(graph, step):
        raise ValueError(
            "train_step applies an optimizer within a loop that TensorFlow runs (tf.while_loop, or a Python loop over "
            "tensors that AutoGraph has converted), so that its updates cannot be told apart. Use a Python loop over "
            f"range(...), as many times as there are updates. Received: {optimizer.name!r}"
        )
    if branch_around(graph, step):
        raise ValueError(
            "train_step applies an optimizer within a branch that TensorFlow chooses (tf.cond, or a Python if over "
            "tensors that AutoGraph has converted), which is not supported under a tf.distribute strategy. "
            "Apply it in every step. To update every n-th step alone, give the optimizer "
            f"gradient_accumulation_steps=n. Received: {optimizer.name!r}"
        )


def no_parts_eagerly(model: Model) -> ValueError:
    """Return the error for a step that runs eagerly and computes with weights that it has updated before."""
    return ValueError(
        "train_step computes with weights that it has just updated, and runs eagerly, so that no trace shows where to "
        "divide it. Leave run_eagerly=True out, or take all gradients before the first apply. Received: "
        f"{type(model).__name__}"
    )
