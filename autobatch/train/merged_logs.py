"""The logs of one micro-batch after another, merged into those of the effective batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.train.derived_logs import Derived
from autobatch.train.logs import Results

Logs = Any
"""What a step returns: a nest of tensors, mostly a dictionary of scalars."""


class MergedLogs:
    """What a step's logs are made of, and how those of several micro-batches become one.

    ``averaged`` tells which parts are averaged over the micro-batches, ``joined`` which have a number for each sample
    and are put one behind the other; the others stand for all micro-batches so far. ``returned_by`` is, for each part,
    the metric whose result it is and its place there. All are known once a step was run or traced.
    """

    def __init__(self) -> None:
        self.averaged: list[bool] = []
        self.joined: list[bool] = []
        self.returned_by: list[tuple[Any, int] | None] = []
        self._structure: Logs = None
        self._latest: list[Any] = []  # of the last micro-batch, where steps run eagerly
        self._derived: list[Derived | None] = []

    def note_structure(self, logs: Logs) -> None:
        """Note the logs as a traced step returns them."""
        self._structure = logs

    def note(
        self, logs: Logs, results: Results, batch: Sequence[Any], terms: Any, variables: Sequence[Any] | None
    ) -> Logs:
        """Note what a step has returned; return it with the parts weighed that are averaged.

        ``batch`` are the tensors of the micro-batch. ``variables`` are those that the step touches, where a metric was
        held back, None where none was.
        """
        parts = _named_parts(logs)
        self._derived = [] if variables is None else [results.derived(part, variables) for _, part in parts]
        self.returned_by = [results.returned_by(part) for _, part in parts]
        averaged = averaged_parts(logs, results, batch)
        joined = [terms.is_for_each_sample(part) and not results.holds(name, part, batch) for name, part in parts]
        if tf.executing_eagerly():
            if self.averaged:  # what was no result once is none, though its value was a result's before
                averaged = [now or before for now, before in zip(averaged, self.averaged, strict=True)]
            if self.joined:  # one as long as a micro-batch by chance is not as long as all
                joined = [now and before for now, before in zip(joined, self.joined, strict=True)]
        self.averaged, self.joined = averaged, joined
        self._structure = logs
        return terms.weighed_logs(logs, averaged)

    def empty(self) -> list[Any]:
        """Zeros in the shape of the logs, to carry through the loop; nothing where there was no trace to learn from."""
        if tf.executing_eagerly():
            self.averaged, self.joined = [], []
        if self._structure is None or tf.executing_eagerly():
            return []
        return [
            tf.zeros([0 if size is None else size for size in part.shape], part.dtype)
            for part in tf.nest.flatten(self._structure)
            if part is not None
        ]

    def merged(self, carried: list[Any], logs: Logs, fraction: Any) -> list[Any]:
        """The logs so far, with those of one more micro-batch that is ``fraction`` of the effective batch."""
        parts = [tf.convert_to_tensor(part) for part in tf.nest.flatten(logs) if part is not None]
        if tf.executing_eagerly():  # it is the last micro-batch that shows which are results, and which are joined
            carried = carried or [(tf.zeros_like(part), part[:0] if part.shape.rank else part) for part in parts]
            self._latest = parts
            return [
                (
                    total + part * tf.cast(fraction, part.dtype) if _is_scalar(part) else total,
                    tf.concat([before, part], 0) if part.shape.rank and before.shape[1:] == part.shape[1:] else part,
                )
                for (total, before), part in zip(carried, parts, strict=True)
            ]
        merged = []
        for before, part, is_summed, is_joined in zip(carried, parts, self.averaged, self.joined, strict=True):
            if is_summed:
                merged.append(before + tf.cast(part, before.dtype) * tf.cast(fraction, before.dtype))
            else:
                merged.append(tf.concat([before, part], 0) if is_joined else part)
        return merged

    def as_of_now(self, parts: list[Any]) -> list[Any]:
        """The logs with the results of metrics, and what is computed from them, as they are now."""

        def result_of(metric: Any, place: int) -> Any:
            return tf.nest.flatten(metric.result())[place]

        values = [result_of(*by) if by is not None else None for by in self.returned_by]
        values = [
            derived.now(result_of) if derived is not None and not averaged else value
            for derived, averaged, value in zip(self._derived, self.averaged, values, strict=True)
        ]
        return [
            part if value is None else tf.cast(value, part.dtype) for part, value in zip(parts, values, strict=True)
        ]

    def pack(self, parts: list[Any]) -> Logs:
        """The logs in the structure in which the step returned them."""
        if self._latest:
            all_of_them = zip(parts, self._latest, self.averaged, self.joined, strict=True)
            parts = [
                total if averaged else joined if is_joined else latest
                for (total, joined), latest, averaged, is_joined in all_of_them
            ]
            self._latest = []
        remaining = iter(parts)
        flat = [None if part is None else next(remaining) for part in tf.nest.flatten(self._structure)]
        return tf.nest.pack_sequence_as(self._structure, flat)


def averaged_parts(logs: Logs, results: Results, batch: Sequence[Any]) -> list[bool]:
    """For each part of the logs, whether it is averaged: a number of its micro-batch that is no metric's result."""
    return [_is_scalar(part) and not results.holds(name, part, batch) for name, part in _named_parts(logs)]


def _named_parts(logs: Logs) -> list[tuple[str, Any]]:
    """What is in the logs, each under the key of the dictionary that it is in."""
    if not isinstance(logs, dict):
        return [("", part) for part in tf.nest.flatten(logs) if part is not None]
    # tf.nest sorts a dict by its keys; so must this.
    return [(key, part) for key in sorted(logs) for part in tf.nest.flatten(logs[key]) if part is not None]


def _is_scalar(part: Any) -> bool:
    tensor = tf.convert_to_tensor(part)
    return bool(tensor.dtype.is_floating and tensor.shape.rank == 0)
