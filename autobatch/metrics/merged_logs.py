"""Logs of one micro-batch after another, merged into those of the effective batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.losses.totals import LogKind
from autobatch.metrics.derived_logs import Derived
from autobatch.metrics.results import MetricResults
from autobatch.types import Metric, Tensor, Variable

Logs = Any
"""Return value of a step: a nest of tensors, mostly a dictionary of scalars."""


class MergedLogs:
    """Parts of a step's logs, and the way to merge those of several micro-batches.

    Attributes:
        kinds: the kind of each part, which decides how it is merged; known once a step was run or traced.
        returned_by: for each part, the metric whose result it is and its place there, or None; known when ``kinds`` is.
        not_told: names of parts that may not be the effective batch's.
    """

    def __init__(self) -> None:
        self.kinds: list[LogKind] = []
        self.returned_by: list[tuple[Any, int] | None] = []
        self.not_told: tuple[str, ...] = ()
        self._structure: Logs = None
        self._latest: list[Any] = []  # of the last micro-batch, if steps run eagerly
        self._derived: list[Derived | None] = []

    @property
    def averaged(self) -> list[bool]:
        """True for each part that is a single number averaged over the micro-batches."""
        parts = [part for part in tf.nest.flatten(self._structure) if part is not None]
        return [
            kind in (LogKind.AVERAGED, LogKind.NOT_TOLD) and _is_scalar(part)
            for kind, part in zip(self.kinds, parts, strict=True)
        ]

    def note_structure(self, logs: Logs) -> None:
        """Note the logs as a traced step returns them."""
        self._structure = logs

    def note(
        self,
        logs: Logs,
        results: MetricResults,
        batch: Sequence[Tensor],
        terms: Any,
        variables: Sequence[Variable] | None,
    ) -> Logs:
        """Note what a step has returned; return it with its averaged parts weighed.

        Args:
            logs: what the step returned.
            results: the results of metrics in that step.
            batch: the tensors of the micro-batch.
            terms: the losses of that step, which decide how other parts are merged.
            variables: those that the step touches if a metric was held back; None if none was.
        """
        parts = _named_parts(logs)
        self._derived = [] if variables is None else [results.derived(part, variables) for _, part in parts]
        self.returned_by = [results.returned_by(part) for _, part in parts]
        kinds = kinds_of(logs, results, batch, terms)
        if tf.executing_eagerly() and self.kinds:
            kinds = [_settled(before, now) for before, now in zip(self.kinds, kinds, strict=True)]
        self.kinds, self._structure = kinds, logs
        names = [
            name
            for (name, part), kind in zip(parts, kinds, strict=True)
            if kind is LogKind.NOT_TOLD or (kind is LogKind.JOINED and terms.has_numbers_of_the_batch(part))
        ]
        self.not_told = tuple(dict.fromkeys(names))
        return terms.weighed_logs(logs, kinds)

    def empty(self) -> list[Any]:
        """Return logs of no samples, to start the loop with; an empty list if no trace has shown their shapes."""
        if tf.executing_eagerly():
            self.kinds = []
        if self._structure is None or tf.executing_eagerly():
            return []
        parts = [part for part in tf.nest.flatten(self._structure) if part is not None]
        empty = []
        for part, kind in zip(parts, self.kinds, strict=True):
            shape = [0 if size is None else size for size in part.shape]
            empty.append(_least(shape, part.dtype, kind))
        return empty

    def merged(self, carried: list[Any], logs: Logs, fraction: Tensor) -> list[Any]:
        """Return the logs so far, merged with those of a micro-batch that is ``fraction`` of the effective batch."""
        parts = [tf.convert_to_tensor(part) for part in tf.nest.flatten(logs) if part is not None]
        if tf.executing_eagerly():  # only the last micro-batch shows which parts are results, and which are joined
            carried = carried or [(tf.zeros_like(part), part[:0] if part.shape.rank else part) for part in parts]
            self._latest = parts
            return [
                (
                    total + part * tf.cast(fraction, part.dtype) if _is_scalar(part) else total,
                    tf.concat([before, part], 0) if part.shape.rank and before.shape[1:] == part.shape[1:] else part,
                )
                for (total, before), part in zip(carried, parts, strict=True)
            ]
        return [
            _merged(before, part, kind, fraction) for before, part, kind in zip(carried, parts, self.kinds, strict=True)
        ]

    def empty_at(self, places: Sequence[int]) -> list[Any]:
        """Return the parts at some places of the logs of no samples, in a traced step."""
        empty = self.empty()
        return [empty[place] for place in places]

    def merged_at(self, places: Sequence[int], carried: Sequence[Any], parts: Sequence[Any], fraction: Tensor) -> Any:
        """Return the parts at some places of the logs of a traced step, merged with those of one more micro-batch."""
        kinds = [self.kinds[place] for place in places]
        return [_merged(before, part, kind, fraction) for before, part, kind in zip(carried, parts, kinds, strict=True)]

    def as_of_now(self, parts: list[Any]) -> list[Any]:
        """Return the logs with the present results of metrics, and with what is computed from them."""

        def result_of(metric: Metric, place: int) -> Any:
            return tf.nest.flatten(metric.result())[place]

        values = [result_of(*by) if by is not None else None for by in self.returned_by]
        values = [
            derived.now(result_of) if derived is not None and kind is LogKind.LAST else value
            for derived, kind, value in zip(self._derived, self.kinds, values, strict=True)
        ]
        return [
            part if value is None else tf.cast(value, part.dtype) for part, value in zip(parts, values, strict=True)
        ]

    def pack(self, parts: list[Any]) -> Logs:
        """Return the logs in the structure in which the step returned them."""
        if self._latest:
            all_of_them = zip(parts, self._latest, self.kinds, strict=True)
            parts = [
                total if kind is LogKind.AVERAGED else joined if kind is LogKind.JOINED else latest
                for (total, joined), latest, kind in all_of_them
            ]
            self._latest = []
        remaining = iter(parts)
        flat = [None if part is None else next(remaining) for part in tf.nest.flatten(self._structure)]
        return tf.nest.pack_sequence_as(self._structure, flat)


def kinds_of(logs: Logs, results: MetricResults, batch: Sequence[Tensor], terms: Any) -> list[LogKind]:
    """Return the kind of each part of the logs: ``LAST`` for a metric's result, which covers all micro-batches."""
    return [
        LogKind.LAST if results.holds(name, part, batch) else terms.kind_of(part) for name, part in _named_parts(logs)
    ]


def _least(shape: list[int], dtype: Any, kind: LogKind) -> Any:
    """Return the neutral element of a kind: a part merged with it stays the same."""
    if kind is LogKind.LARGEST and dtype != tf.bool:
        return tf.fill(shape, tf.constant(dtype.min, dtype))
    if kind is LogKind.SMALLEST:
        return tf.fill(shape, tf.constant(True if dtype == tf.bool else dtype.max, dtype))
    return tf.zeros(shape, dtype)


def _settled(before: LogKind, now: LogKind) -> LogKind:
    """Return the kind of a part after another eager micro-batch, which may show more than those before.

    A part that once was no metric's result is none, though its value equalled one before. A part is joined only if it
    is as long as each micro-batch, not as one by chance.
    """
    if LogKind.AVERAGED in (before, now):
        return LogKind.AVERAGED
    return now if before is now else LogKind.LAST


def _merged(before: Any, part: Any, kind: LogKind, fraction: Tensor) -> Any:
    if kind is LogKind.AVERAGED or (kind is LogKind.NOT_TOLD and _is_scalar(part)):
        return before + tf.cast(part, before.dtype) * tf.cast(fraction, before.dtype)
    if kind is LogKind.SUMMED:
        return before + part
    if kind is LogKind.JOINED:
        return tf.concat([before, part], 0)
    if kind in (LogKind.LARGEST, LogKind.SMALLEST):
        larger, smaller = (tf.logical_or, tf.logical_and) if part.dtype == tf.bool else (tf.maximum, tf.minimum)
        return (larger if kind is LogKind.LARGEST else smaller)(before, part)
    return part


def of_all_replicas(parts: Sequence[Any], kind: LogKind) -> Any:
    """Combine one part of the logs from several replicas; return the first one's if all have the same."""
    if kind is LogKind.JOINED:
        return tf.concat(parts, 0)
    if kind in (LogKind.AVERAGED, LogKind.SUMMED):
        return tf.add_n(parts)
    if kind in (LogKind.LARGEST, LogKind.SMALLEST):
        return functools.reduce(lambda one, other: _merged(one, other, kind, 1.0), parts)
    return parts[0]


def _named_parts(logs: Logs) -> list[tuple[str, Any]]:
    """Return the parts of the logs, each with its key in the dictionary; the key is "" if there is none."""
    if not isinstance(logs, dict):
        return [("", part) for part in tf.nest.flatten(logs) if part is not None]
    # tf.nest sorts a dict by its keys; so must this.
    return [(key, part) for key in sorted(logs) for part in tf.nest.flatten(logs[key]) if part is not None]


def _is_scalar(part: Any) -> bool:
    tensor = tf.convert_to_tensor(part)
    return bool(tensor.dtype.is_floating and tensor.shape.rank == 0)


def not_told_eagerly(logs: Logs, kinds: Sequence[LogKind], terms: Any) -> tuple[str, ...]:
    """Return the names of parts of the logs that a trace can merge, but eager micro-batches cannot."""
    found = []
    for (name, part), kind in zip(_named_parts(logs), kinds, strict=True):
        single = kind is LogKind.AVERAGED and _is_scalar(part) and terms.is_weighed(part)
        if kind not in (LogKind.LAST, LogKind.JOINED) and not single:
            found.append(name)
    return tuple(dict.fromkeys(found))
