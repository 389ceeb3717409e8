"""Metrics that are given the whole effective batch at once in a model that runs eagerly.

There is no trace to look at, so the updates of every class and function that is not Keras's are held back. See
:mod:`autobatch.metrics.whole_batch` for models that are traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.metrics import whole_batch
from autobatch.seams import metrics, patching
from autobatch.tensors.batch_structure import sample_count
from autobatch.types import Metric, Tensor


class EagerUpdates:
    """Updates of metrics that an eager micro-step holds back.

    With the last micro-batch each update runs at its place in the step, so that the code after it sees its result.
    """

    def __init__(self) -> None:
        self._met: dict[int, Any] = {}
        self._pieces: dict[tuple[int, int], _Pieces] = {}
        self._not_before: dict[int, Any] = {}
        self._seen = 0
        self.updated_in_parts: dict[str, str] = {}
        self.sample_bytes = 0  # not known: an eager step is not traced

    @contextlib.contextmanager
    def holding(
        self,
        leaves: Sequence[Tensor],
        fraction: Tensor,
        *,
        discard: bool = False,
        is_conditional: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Any]]:
        """Hold back updates while a micro-step runs, or run them with the last one; yield an empty list.

        ``discard`` is for a run that only counts: its updates are neither kept nor run. ``is_conditional`` is for
        traced steps.
        """
        samples = int(sample_count(list(leaves)))
        if not discard:
            self._seen += samples
        whole = round(samples / float(fraction))
        is_last = self._seen >= whole
        calls: dict[int, int] = {}

        def offer(metric: Metric, run: Callable[..., Any], args: Any, kwargs: Any) -> bool:
            key = id(metric), calls.get(id(metric), 0)
            calls[id(metric)] = key[1] + 1
            arguments = tf.nest.flatten((args, kwargs))
            pieces = self._pieces.get(key) or _Pieces(metric, run, (args, kwargs), arguments, samples, whole)
            if id(metric) in self._not_before:
                pieces.reason = "result"
            if pieces.reason or discard:
                if pieces.reason in whole_batch.REASONS:
                    self.updated_in_parts.setdefault(metric.name, pieces.reason)
                return not pieces.reason
            self._pieces[key] = pieces
            self._build(metric, run, args, kwargs)
            pieces.add(arguments)
            if is_last:
                del self._pieces[key]
                pieces.update()
            return True

        with (
            metrics.updates_offered(offer, lambda values: _has_rows(values, samples)),
            metrics.failing_results_replaced(_nothing if discard else self._result_after_update),
        ):
            yield []

    def _result_after_update(self, metric: Metric, result: Callable[[], Any]) -> Any:
        """Update a metric whose result cannot be read without the held updates; then hold none of its updates again."""
        held = [key for key in self._pieces if key[0] == id(metric)]
        for key in held:
            self._pieces.pop(key).update()
        if held:
            self._not_before[id(metric)] = metric
            self.updated_in_parts[metric.name] = "result"
        return result()

    def _build(self, metric: Metric, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Let a metric create its variables, since its result is read before the first update that is not held back."""
        if id(metric) not in self._met:
            self._met[id(metric)] = metric
            if not metric.variables:
                with patching.suspended():
                    run(*args, **kwargs)
                    metric.reset_state()

    def empty(self) -> list[Any]:
        """Begin an effective batch: drop what a failed one left behind, and return an empty list."""
        self._pieces, self._seen = {}, 0
        return []

    @staticmethod
    def push(carried: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        """Return an empty list: nothing is carried through the loop."""
        return []

    def finish(self, carried: Sequence[Any]) -> bool:
        """Run the held updates that the last micro-batch did not make; return False: no result needs reading again."""
        for pieces in self._pieces.values():
            pieces.update()
        self._pieces = {}
        return False


class _Pieces:
    """Arguments of one update of a metric, from each micro-batch so far."""

    def __init__(
        self,
        metric: Metric,
        run: Callable[..., Any],
        structure: Any,
        arguments: Sequence[Any],
        samples: int,
        whole: int,
    ) -> None:
        self._run = run
        self._structure = structure
        self._is_held = [_is_array(each) for each in arguments]
        self._pieces: list[list[Any]] = []
        self.reason = self._why_not(metric, [each for each in arguments if _is_array(each)], samples, whole)

    @staticmethod
    def _why_not(metric: Metric, arrays: Sequence[Any], samples: int, whole: int) -> str:
        if arrays and all(_has_rows(each, samples) for each in arrays):
            bytes_here = sum(
                np.size(each) * (each.dtype.size if tf.is_tensor(each) else each.itemsize) for each in arrays
            )
            return "bytes" if bytes_here * whole > whole_batch.MOST_BYTES * samples else ""
        scalars = all(np.ndim(each) == 0 for each in arrays if isinstance(each, (tf.Tensor, np.ndarray)))
        return "mean" if scalars and isinstance(metric, keras.metrics.Mean) else "inputs"

    def add(self, arguments: Sequence[Any]) -> None:
        """Keep the arguments of one micro-batch."""
        self._pieces.append(list(arguments))

    def update(self) -> None:
        """Update the metric once with the arguments of all micro-batches."""
        joined = []
        for place, is_held in enumerate(self._is_held):
            pieces = [arguments[place] for arguments in self._pieces]
            joined.append(_joined(pieces) if is_held else pieces[-1])
        args, kwargs = tf.nest.pack_sequence_as(self._structure, joined)
        with patching.suspended():
            self._run(*args, **kwargs)


def _nothing(metric: Metric, result: Callable[[], Any]) -> Any:
    return 0.0


def _is_array(argument: Any) -> bool:
    return isinstance(argument, np.ndarray) or (tf.is_tensor(argument) and not isinstance(argument, tf.Variable))


def _has_rows(values: Any, samples: int) -> bool:
    is_dense = isinstance(values, (tf.Tensor, np.ndarray))
    return is_dense and np.ndim(values) > 0 and values.shape[0] == samples


def _joined(pieces: Sequence[Any]) -> Any:
    if isinstance(pieces[0], np.ndarray):
        return np.concatenate(pieces)
    with tf.device("CPU:0"):
        whole = tf.concat(pieces, axis=0)
        masks = [metrics.mask_of(piece) for piece in pieces]
        if all(mask is not None for mask in masks):
            metrics.set_mask(whole, tf.concat(masks, axis=0))
    return whole
