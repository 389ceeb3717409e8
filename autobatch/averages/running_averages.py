"""Running averages that advance once an update, by the statistics of the effective batch.

BatchNormalization moves its statistics with each batch that it sees. So do a user's own layers: a codebook, the range
of an activation, a counter of steps. While a micro-step runs, such an assignment is held back. The statistics that it
is made of are merged over the micro-batches. After the last one it is done once, as one step of the effective batch
would do it. Until then every micro-batch reads the variable's old value, or what it has assigned itself. What follows
the updated weights, such as a teacher that is their average, is assigned after the update.

In a graph, the operations show how the assigned value is made (:mod:`autobatch.averages.recipes`). Where they do not,
the variable is assigned in every micro-batch as usual. A step that runs eagerly has no graph. There, only the
statistics of Keras's BatchNormalization are held back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.averages import batch_statistics
from autobatch.averages.batch_statistics import Statistic, StatisticKind
from autobatch.averages.recipes import Recipe, recipe_of, statistic_at
from autobatch.graphs import linearity, writes
from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.seams import strategies
from autobatch.seams.variables import assignments_taken, has_own_call, moments_handled, statistics_of, update_statistics
from autobatch.tensors.variables import components, unwrap
from autobatch.types import Layer, Model, Tensor, Variable


@dataclass(frozen=True, slots=True)
class Deferred:
    """An assignment that is done once an update: the variable, how its value is made, and the place in the trace."""

    variable: Variable
    recipe: Recipe
    position: int


class RunningAverages:
    """Assignments that a model's micro-steps defer to the end of the update; none before one was traced or run."""

    def __init__(self, model: Model, touched: TouchedVariables) -> None:
        self._model = model
        self._touched = touched
        self._traces: dict[int, _TracedRun | _EagerRun] = {}
        """One trace for each replica, by the replica's number."""

    @contextlib.contextmanager
    def deferring(self, *shares: Any, is_conditional: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Defer, within this context, what can be; ``shares`` hold a micro-batch's share of the effective batch.

        ``is_conditional`` returns True while a branch is traced outside of any branch's graph.
        """
        trace = _EagerRun() if tf.executing_eagerly() else _TracedRun(self._apart(), shares, is_conditional)
        self._traces[_replica()] = trace
        with (
            assignments_taken(trace.take, trace.pending.get),
            moments_handled(trace.note_moments),
        ):
            yield
        trace.settle()

    def _apart(self) -> set[int]:
        """Return the ids of variables that are always assigned at once."""
        owners = [*self._model.metrics, *self._touched.optimizers]
        return {id(variable) for owner in owners for variable in owner.variables}

    def note_applied(self) -> None:
        """Note that the micro-step has reached an update."""
        self._here.note_applied(self._touched.updated_variables)

    @property
    def _here(self) -> _TracedRun | _EagerRun:
        return self._traces[_replica()]

    @property
    def deferred(self) -> list[Deferred]:
        """Assignments of the trace made last, in their order; a variable that is assigned twice occurs twice."""
        here = self._here if self._traces else None
        return here.deferred if isinstance(here, _TracedRun) else []

    @property
    def variables(self) -> list[Variable]:
        """The variables that are assigned once an update."""
        return [variable for trace in self._traces.values() for variable in trace.variables]

    def named_in(self, targets: Iterable[Any]) -> tuple[str, ...]:
        """Return the paths of variables whose statistics the step itself uses: each micro-batch uses its own.

        ``targets`` are the tensors that are differentiated. BatchNormalization is known to do this and is not named.
        """
        return self._here.named_in(list(targets)) if self._traces else ()

    def statistics(self) -> Any:
        """Return the statistics of the micro-batch that has just been traced or run."""
        return self._here.statistics() if self._traces else []

    def empty(self) -> Any:
        """Return the statistics of no samples."""
        return self._here.empty() if self._traces else []

    def merged(self, one: Any, other: Any) -> Any:
        """Merge the statistics of two sets of samples."""
        return self._here.merged(one, other) if self._traces else other

    @property
    def specs(self) -> list[Any]:
        """The type specs of a traced micro-step's statistics."""
        with tf.Graph().as_default():
            return [tf.TensorSpec(state.shape, state.dtype) for state in self.empty()]

    def merged_rows(self, states: list[Any], parts: int) -> list[Any]:
        """Merge the statistics of all replicas; the first dimension of each state has one place for each replica."""
        whole = [state[0] for state in states]
        for part in range(1, parts):
            whole = self.merged(whole, [state[part] for state in states])
        return whole

    def assign(self, statistics: Any) -> None:
        """Assign the deferred variables once, with the statistics of the whole effective batch."""
        if self._traces:
            self._here.assign(statistics)

    def assign_after_update(self) -> None:
        """Assign the variables that follow the updated weights."""
        if self._traces:
            self._here.assign_after_update()

    def release(self) -> None:
        """Let go of the traces."""
        self._traces = {}


def _replica() -> int:
    in_replica = tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context() is False
    return strategies.replica_here() if in_replica else 0


class _Pending:
    """Values that stand for variables in the micro-step that is under way."""

    def __init__(self) -> None:
        self._values: dict[int, Any] = {}

    def get(self, variable: Variable) -> Any:
        return self._values.get(id(variable))

    def set(self, variable: Variable, value: Any) -> None:
        self._values[id(variable)] = value

    def forget(self, variable: Variable) -> None:
        self._values.pop(id(variable), None)

    def clear(self) -> None:
        self._values = {}


class _TracedRun:
    """Deferred assignments of one trace of a micro-step."""

    def __init__(self, apart: set[int], shares: Iterable[Any], is_conditional: Callable[[], bool]) -> None:
        self.pending = _Pending()
        self._is_conditional = is_conditional
        self._apart = apart
        self._shares = {id(share) for share in shares}
        self._graph = tf.compat.v1.get_default_graph()
        self._known: dict[int, Statistic | None] = {}
        """The statistic that a tensor of the graph is, or None, by the tensor's id."""
        self._recipes: dict[int, tuple[Any, Recipe]] = {}
        self._taken: list[Deferred] = []
        self._follows_update: set[int] = set()
        """Ids of the variables that are assigned after the update."""
        self._updated: set[int] = set()
        """Ids of the updated weights' handles."""
        self._read_before: set[int] = set()
        """Ids of the operations that read a weight before it was updated."""
        self._layout: batch_statistics.Layout = []

    @property
    def variables(self) -> list[Variable]:
        return [variable for variable, _ in self._recipes.values()]

    @property
    def deferred(self) -> list[Deferred]:
        return [each for each in self._taken if id(each.variable) in self._recipes]

    @property
    def _statistics(self) -> list[Statistic]:
        found = {id(each): each for _, recipe in self._recipes.values() for each in recipe.statistics}
        return list(found.values())

    def note_moments(self, layer: Layer, inputs: Any, compute: Callable[[], tuple[Any, Any, Any]]) -> tuple[Any, Any]:
        weight, mean, variance = compute()
        statistic = Statistic(StatisticKind.MOMENTS, (mean, variance), weight)
        self._known.update({id(mean): statistic, id(variance): statistic})
        return mean, variance

    def take(self, variable: Variable, value: Any) -> bool:
        recipe = None
        # A value that is assigned within another function's graph, such as a branch, cannot be followed.
        here = tf.compat.v1.get_default_graph() is self._graph and not self._is_conditional()
        if here and not _is_apart(variable, self._apart):
            value = tf.cast(value, unwrap(variable).dtype)
            recipe = recipe_of(value, self._statistic_of) if getattr(value, "graph", None) is self._graph else None
        follows = recipe is not None and self._follows(recipe)
        if recipe is None or follows is None:
            self._recipes.pop(id(variable), None)
            self.pending.forget(variable)
            return False
        self._recipes[id(variable)] = variable, recipe
        self._taken.append(Deferred(variable, recipe, len(self._graph.get_operations())))
        self._follows_update = self._follows_update - {id(variable)} | ({id(variable)} if follows else set())
        self.pending.set(variable, value)
        return True

    def note_applied(self, updated: list[Any]) -> None:
        self._updated.update(id(variable.handle) for variable in components(updated))
        for outer, inner in self._graph.captures:
            if id(writes.given(outer)) in self._updated:
                self._read_before.update(id(operation) for operation in inner.consumers())

    def _follows(self, recipe: Recipe) -> bool | None:
        """Return True if a value is made of updated weights; None where samples or earlier weights count as well."""
        both = zip(recipe.handles, recipe.readings, strict=True)
        weights = [operation for handle, operation in both if id(handle) in self._updated]
        updated = [operation for operation in weights if id(operation) not in self._read_before]
        return None if updated and (len(updated) < len(weights) or recipe.statistics) else bool(updated)

    def _statistic_of(self, tensor: Tensor) -> Statistic | None:
        if id(tensor) not in self._known:
            statistic = statistic_at(tensor, self._shares)
            self._known[id(tensor)] = statistic
        return self._known[id(tensor)]

    def settle(self) -> None:
        """Assign at once, as the micro-step itself does, what depends on a variable that every micro-batch changes."""
        self.pending.clear()
        while True:
            written = writes.written_handles(self._graph)
            moved = [
                (variable, recipe)
                for variable, recipe in self._recipes.values()
                if any(id(handle) in written for handle in recipe.handles)
            ]
            for variable, recipe in moved:
                del self._recipes[id(variable)]
                variable.assign(recipe.value)
            if not moved:
                break
        self._layout = batch_statistics.layout_of(self._statistics)

    def named_in(self, targets: list[Any]) -> tuple[str, ...]:
        named = []
        for variable, recipe in self._recipes.values():
            own = [statistic for statistic in recipe.statistics if statistic.sources]
            if any(_is_used(statistic, targets, self._statistics) for statistic in own):
                named.append(variable.path)
        return tuple(named)

    def statistics(self) -> list[Any]:
        return batch_statistics.packed(self._statistics)

    def empty(self) -> list[Any]:
        return batch_statistics.empty(self._layout)

    def merged(self, one: Any, other: Any) -> list[Any]:
        return batch_statistics.merged_statistics(self._layout, one, other)

    def assign(self, statistics: Any) -> None:
        self._assign(batch_statistics.unpacked(self._statistics, statistics), follows_update=False)

    def assign_after_update(self) -> None:
        self._assign({}, follows_update=True)

    def _assign(self, known: dict[int, Any], *, follows_update: bool) -> None:
        values = [
            (variable, recipe.follow(known))
            for variable, recipe in self._recipes.values()
            if (id(variable) in self._follows_update) is follows_update
        ]
        with tf.control_dependencies([value for _, value in values]):
            for variable, value in values:
                variable.assign(tf.identity(value))


def _is_used(statistic: Statistic, targets: list[Any], others: list[Statistic]) -> bool:
    """Return True if a micro-batch's own statistic changes the loss, or another statistic, other than linearly."""
    results = [*targets]
    for other in others:
        if other is not statistic and statistic.parts[0] is not other.parts[0]:
            results += other.sources
    following = linearity.what_follows(statistic.parts)
    return any(
        result.graph is statistic.parts[0].graph
        and linearity.not_linear_in(result, statistic.parts, lambda each: id(each) not in following) is not None
        for result in results
    )


class _EagerRun:
    """BatchNormalization layers of one micro-step that runs eagerly."""

    def __init__(self) -> None:
        self.pending = _Pending()
        self._deferred: set[int] = set()
        self._layers: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._states: dict[tuple[int, int], Any] = {}
        """Layer, shape of its inputs and packed moments, by the layer's id and the number of its call in the step."""

    @property
    def variables(self) -> list[Variable]:
        return []

    def note_moments(self, layer: Layer, inputs: Any, compute: Callable[[], tuple[Any, Any, Any]]) -> tuple[Any, Any]:
        weight, mean, variance = compute()
        if not has_own_call(layer):
            self._deferred.update(id(variable) for variable in statistics_of(layer))
            key = id(layer), sum(known == id(layer) for known, _ in self._states)
            statistic = Statistic(StatisticKind.MOMENTS, (mean, variance), weight)
            self._states[key] = layer, inputs.shape, batch_statistics.packed([statistic])[0]
        return mean, variance

    def take(self, variable: Variable, value: Any) -> bool:
        if id(variable) not in self._deferred:
            return False
        self.pending.set(variable, value)
        return True

    def note_applied(self, updated: list[Any]) -> None:
        pass

    def settle(self) -> None:
        self.pending.clear()

    def named_in(self, targets: list[Any]) -> tuple[str, ...]:
        return ()

    def statistics(self) -> Any:
        return self._states

    def empty(self) -> Any:
        return {}

    def merged(self, one: Any, other: Any) -> Any:
        whole = dict(one)
        for key, (layer, shape, state) in other.items():
            before = whole.get(key)
            whole[key] = layer, shape, state if before is None else batch_statistics.merged_moments(before[2], state)
        return whole

    def assign(self, statistics: Any) -> None:
        for layer, shape, state in statistics.values():
            update_statistics(layer, shape, *batch_statistics.mean_and_variance(state))

    def assign_after_update(self) -> None:
        pass


def _is_apart(variable: Variable, apart: set[int]) -> bool:
    """Return True if a variable is a weight, a seed or a metric's sum, which are always assigned at once.

    The model need not know the variable.
    """
    is_seed = "seed_generator_state" in str(variable.name)
    return variable.trainable or is_seed or variable.aggregation == "sum" or id(variable) in apart
