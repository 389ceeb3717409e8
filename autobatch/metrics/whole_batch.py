"""Metrics that are given the whole effective batch at once, as plain Keras gives it to them.

A mean of per-batch numbers, a last value or a count of calls changes if a metric is updated once for each micro-batch.
So an update that is not known to be a sum over samples is held back. Its arguments from each micro-batch are kept on
the host and joined. After the last micro-batch the metric is updated once, also on the host. The device needs no memory
for it, and the outputs that are kept are small beside activations.

These updates are not held back: those of Keras's own metrics, except functions that make one number of a batch; those
of a class or function whose traced update is seen to add sums over samples (:mod:`autobatch.metrics.row_sums`); and
those that cannot be, for one of :data:`REASONS`.

To examine an update, it is traced once more than in plain Keras, on symbolic inputs. Variables keep their values, but
Python side effects of the update happen once more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from autobatch.graphs import linearity
from autobatch.metrics import row_sums
from autobatch.seams import metrics, patching
from autobatch.tensors.variables import components
from autobatch.types import Graph, Metric, Tensor, Variable

MOST_BYTES = 64 * 2**20
"""Most bytes that the inputs held for an effective batch may take.

An update that would exceed it runs with each micro-batch. A traced step counts all held inputs together, an eager step
those of each update alone.
"""

_OPEN_DIMENSION = 1024
"""Size assumed for a dimension that varies, such as a length of text, when bytes are estimated."""

_UNKNOWN_SAMPLES = 1024
"""Samples assumed for an effective batch whose size is not known beforehand."""

REASONS = {
    "bytes": f"what a full batch gives it takes more than {MOST_BYTES >> 20} MiB",
    "inputs": "not all that it is given is a dense tensor whose first dimension counts samples",
    "graph": "it is updated within a loop or a branch of the step",
    "result": "its result cannot be read before its first update",
    "trace": "its update cannot be traced by itself",
    "model": "it uses variables that are not its own, those of a model say",
}
"""Reasons for which an update is not held back, by their short names."""


def sentences(updated_in_parts: Mapping[str, str]) -> list[str]:
    """Return one sentence for each reason, on the metrics that are updated with each micro-batch because of it.

    ``updated_in_parts`` maps names of metrics to keys of :data:`REASONS`.
    """
    named: dict[str, list[str]] = {}
    for name, reason in updated_in_parts.items():
        named.setdefault(reason, []).append(name)
    return [
        f"The metric {', '.join(names)} is updated with each micro-batch, not with the full batch, because "
        f"{REASONS[reason]}. Its result is the full batch's only where it is a sum or a mean over samples."
        for reason, names in named.items()
    ]


@dataclass(frozen=True, slots=True)
class _Given:
    """Placeholder for a tensor argument of an update: the places of the tensor and its mask among the held parts."""

    place: int
    mask: int | None


@dataclass(frozen=True, slots=True)
class _MetricUpdate:
    """One held update of a metric: the function to run, and its arguments with a :class:`_Given` for each tensor."""

    run: Callable[..., Any]
    structure: Any
    arguments: tuple[Any, ...]

    def __call__(self, parts: Sequence[Any]) -> None:
        """Run the update with these tensors."""
        filled = []
        for each in self.arguments:
            if isinstance(each, _Given):
                tensor = parts[each.place]
                if each.mask is not None:
                    metrics.set_mask(tensor, parts[each.mask])
                filled.append(tensor)
            else:
                filled.append(each)
        args, kwargs = tf.nest.pack_sequence_as(self.structure, filled)
        self.run(*args, **kwargs)


class HeldUpdates:
    """Updates of metrics that a traced micro-step holds back.

    ``samples`` is the number of samples in an effective batch; None if it is not known.
    :class:`.eager_updates.EagerUpdates` is for steps that run eagerly.
    """

    def __init__(self, samples: int | None) -> None:
        self._samples = samples or _UNKNOWN_SAMPLES
        self._updates: list[_MetricUpdate] = []
        self._specs: list[tuple[tf.TensorSpec, bool]] = []
        self._known: dict[tuple[int, int], tuple[Any, str]] = {}
        self.updated_in_parts: dict[str, str] = {}
        """Metrics that are updated with each micro-batch though not known to be sums over samples: name to reason."""

    @property
    def sample_bytes(self) -> int:
        """Bytes that are held for each sample."""
        return sum(_sample_bytes(spec) for spec, _ in self._specs)

    @contextlib.contextmanager
    def holding(
        self,
        leaves: Sequence[Tensor],
        fraction: Tensor,
        *,
        discard: bool = False,
        is_conditional: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Any]]:
        """Hold back updates while a micro-step is traced; yield the list of tensors that the step must return.

        ``discard`` is for a trace that only counts: its held updates are dropped. ``is_conditional`` returns True while
        a branch is traced outside of any branch's graph.
        """
        graph = tf.compat.v1.get_default_graph()
        step = _TracedStep(graph, self._samples, self._known, is_conditional)
        with metrics.updates_offered(step.offer, _is_per_sample):
            yield step.parts
        if not discard:
            self._updates, self._specs, self.updated_in_parts = step.updates, step.specs, step.updated_in_parts

    def empty(self) -> list[Any]:
        """Return what the loop over micro-batches starts with: an empty tensor list for each part, on the host."""
        with tf.device("CPU:0"):
            return [
                tf.raw_ops.EmptyTensorList(
                    element_shape=[-1 if size is None else size for size in spec.shape],
                    max_num_elements=-1,
                    element_dtype=spec.dtype,
                )
                for spec, _ in self._specs
            ]

    def empty_at(self, places: Sequence[int]) -> list[Any]:
        """Return what the loop starts with for some of the parts."""
        empty = self.empty()
        return [empty[place] for place in places]

    @staticmethod
    def push(carried: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        """Append the parts of one micro-batch, and return the longer lists."""
        with tf.device("CPU:0"):
            return [
                tf.raw_ops.TensorListPushBack(input_handle=held, tensor=part)
                for held, part in zip(carried, parts, strict=True)
            ]

    def finish(self, carried: Sequence[Any]) -> bool:
        """Update every held metric once with the parts of all micro-batches; return True if there was any."""
        with tf.device("CPU:0"), patching.suspended():
            parts = [_together(held, spec, joined) for held, (spec, joined) in zip(carried, self._specs, strict=True)]
            for update in self._updates:
                update(parts)
        return bool(self._updates)


def _together(held: Any, spec: tf.TensorSpec, joined: bool) -> Any:
    shape = [-1 if size is None else size for size in spec.shape]
    if not joined:
        last = tf.raw_ops.TensorListPopBack(input_handle=held, element_shape=shape, element_dtype=spec.dtype)
        return tf.ensure_shape(last.tensor, spec.shape)
    whole = tf.raw_ops.TensorListConcatV2(
        input_handle=held, element_shape=shape, leading_dims=tf.zeros([0], tf.int64), element_dtype=spec.dtype
    )
    return tf.ensure_shape(whole.tensor, spec.shape)


def _is_per_sample(values: Any) -> bool:
    shape = tf.TensorShape(getattr(values, "shape", None))
    return shape.rank is None or (shape.rank > 0 and shape[0] is None)


class _TracedStep:
    """Decisions on the updates in one trace of the micro-step: each is held back or runs."""

    def __init__(
        self,
        graph: Graph,
        samples: int,
        known: dict[tuple[int, int], tuple[Any, str]],
        is_conditional: Callable[[], bool],
    ) -> None:
        self._graph = graph
        self._is_conditional = is_conditional
        self._samples = samples
        self._known = known
        self._calls: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._on_arguments: dict[Any, bool] = {}
        self.parts: list[Any] = []
        self.specs: list[tuple[tf.TensorSpec, bool]] = []
        self.updates: list[_MetricUpdate] = []
        self.updated_in_parts: dict[str, str] = {}

    def offer(self, metric: Metric, run: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Hold the update back unless there is a reason not to; return True if it is held."""
        call = self._calls.get(id(metric), 0)
        self._calls[id(metric)] = call + 1
        # If AutoGraph converts the step, it converts what the step calls.
        run = tf.__internal__.autograph.tf_convert(run, tf.__internal__.autograph.control_status_ctx())
        arguments = tf.nest.flatten((args, kwargs))
        if (id(metric), call) not in self._known:
            # Under a strategy, and in a trace that only counts, the same update is offered again.
            self._known[id(metric), call] = metric, self._why_not(metric, run, (args, kwargs), arguments)
        reason = self._known[id(metric), call][1]
        if reason in REASONS:
            self.updated_in_parts.setdefault(metric.name, reason)
        if reason:
            return False
        given = tuple(self._hold(each) if _is_tensor(each) else each for each in arguments)
        structure = tf.nest.pack_sequence_as((args, kwargs), [None] * len(given))
        self.updates.append(_MetricUpdate(run, structure, given))
        return True

    def _why_not(self, metric: Metric, run: Callable[..., Any], structure: Any, arguments: Sequence[Any]) -> str:
        tensors = [each for each in arguments if _is_tensor(each)]
        if any(not isinstance(each, tf.Tensor) for each in tensors):
            return "inputs"
        masks = [mask for each in tensors if (mask := metrics.mask_of(each)) is not None]
        if self._is_conditional():
            return "graph"
        here = tf.compat.v1.get_default_graph()
        if any(graph is not self._graph for graph in (here, *(each.graph for each in (*tensors, *masks)))):
            return "graph"
        changing = [each for each in (*tensors, *masks) if self._depends_on_data(each)]
        if not changing or any(not _is_per_sample(each) for each in changing):
            scalars = all(each.shape.rank == 0 for each in changing)
            return "mean" if scalars and isinstance(metric, keras.metrics.Mean) else "inputs"
        reason = _look_into(metric, run, structure, arguments)
        if reason:
            return reason
        new = {id(each): each for each in (*tensors, *masks) if id(each) not in self._places}
        held = [spec for spec, _ in self.specs] + [tf.TensorSpec(each.shape, each.dtype) for each in new.values()]
        return "bytes" if sum(map(_sample_bytes, held)) * self._samples > MOST_BYTES else ""

    def _depends_on_data(self, tensor: Tensor) -> bool:
        return linearity.depends_on_arguments(tensor, self._on_arguments)

    def _hold(self, tensor: Tensor) -> _Given:
        mask = metrics.mask_of(tensor)
        return _Given(self._place_of(tensor), None if mask is None else self._place_of(mask))

    def _place_of(self, tensor: Tensor) -> int:
        """Return the place of a tensor among the parts; a tensor that several metrics are given is held once."""
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(self.parts)
            self.parts.append(tensor)
            self.specs.append((tf.TensorSpec(tensor.shape, tensor.dtype), self._depends_on_data(tensor)))
        return self._places[id(tensor)]


def _is_tensor(argument: Any) -> bool:
    """Return True if an argument is a tensor of a graph, or made of such tensors, and no variable."""
    return tf.is_tensor(argument) and not isinstance(argument, tf.Variable) and hasattr(_a_part_of(argument), "graph")


def _a_part_of(tensor: Tensor) -> Any:
    return tf.nest.flatten(tensor, expand_composites=True)[0]


def _sample_bytes(spec: tf.TensorSpec) -> int:
    return math.prod(_OPEN_DIMENSION if size is None else size for size in spec.shape[1:]) * (spec.dtype.size or 8)


def _look_into(metric: Metric, run: Callable[..., Any], structure: Any, arguments: Sequence[Any]) -> str:
    """Trace an update by itself; return the reason not to hold it back, or "" to hold it.

    The reason is "sum" if the update adds sums over samples. The trace creates the variables that a metric creates at
    its first update, so that its result can be read before that.
    """
    symbols = [each for each in arguments if _is_tensor(each)]
    masks = [metrics.mask_of(each) for each in symbols]
    rows: list[Any] = []
    trusted: list[tuple[Any, Any]] = []

    def note(inner: Variable, its_own: Callable[..., Any], args: Any, kwargs: Any) -> None:
        def alone() -> None:
            its_own(*args, **kwargs)

        trusted.append((inner, tf.nest.flatten((args, kwargs))))
        tf.function(alone, autograph=False).get_concrete_function()

    def update(tensors: Sequence[Tensor], their_masks: Sequence[Any]) -> None:
        rows.extend([*tensors, *(mask for mask in their_masks if mask is not None)])
        for tensor, mask in zip(tensors, their_masks, strict=True):
            if mask is not None:
                metrics.set_mask(tensor, mask)
        remaining = iter(tensors)
        filled = [next(remaining) if _is_tensor(each) else each for each in arguments]
        args, kwargs = tf.nest.pack_sequence_as(structure, filled)
        run(*args, **kwargs)

    specs = [
        [None if each is None else tf.TensorSpec(each.shape, each.dtype) for each in part] for part in (symbols, masks)
    ]
    try:
        with patching.suspended(), metrics.additive_updates_noted(note):
            graph = tf.function(update, autograph=False).get_concrete_function(*specs).graph
    except Exception:  # noqa: BLE001 - what is wrong with it, the update itself raises in the user's own code
        return "trace"
    kinds = row_sums.Kinds(graph, rows)
    writes = [*trusted, *(each for each in graph.get_operations() if each.type.startswith("Assign"))]
    if bool(writes) and kinds.adds_sums_alone() and all(_sums_rows(kinds, given) for _, given in trusted):
        return "sum"
    own = {
        id(variable) for each in (metric, *(inner for inner, _ in trusted)) for variable in components(each.variables)
    }
    others = [variable for variable in components(graph.variables) if id(variable) not in own]
    return "model" if any(not _is_state(variable) for variable in others) else ""


def _is_state(variable: Variable) -> bool:
    """Return True if a variable belongs to a seed or a metric."""
    return "seed_generator_state" in str(variable.name) or variable.aggregation == tf.VariableAggregation.SUM


def _sums_rows(kinds: row_sums.Kinds, given: Sequence[Any]) -> bool:
    """Return True if one of Keras's metrics is given rows of samples, and otherwise only numbers free of data."""
    found = {kinds.of(each) for each in given if tf.is_tensor(each) and each.shape.rank != 0}
    scalars = {kinds.of(each) for each in given if tf.is_tensor(each) and each.shape.rank == 0}
    return found == {row_sums.ROWS} and scalars <= {row_sums.FREE}
