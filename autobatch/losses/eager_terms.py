"""Weights for the losses of a step that runs eagerly, without a graph that shows what they are made of.

The step is traced once, and the trace is never run. It records, in their order, the requests to
:class:`autobatch.losses.loss_terms.LossTerms` and the degree of each. The record then holds for every eager run of the
same code. A function of several sums cannot be weighed without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from autobatch.losses.totals import LogKind
from autobatch.types import Tensor


class EagerTerms:
    """Weights for one eager run on one micro-batch of ``samples``.

    ``told`` is the trace's record of requests; it is empty where there was no trace. ``gradient_factor`` returns the
    factor for the gradient of a target that is not in the record.
    """

    def __init__(
        self, told: Iterable[tuple[str, Any]], fraction: Tensor, samples: int, gradient_factor: Callable[[Any], Any]
    ) -> None:
        told = tuple(told)
        self._is_traced = bool(told)
        self._told: Iterator[tuple[str, Any]] = iter(told)
        self._fraction = fraction
        self._samples = samples
        self._gradient_factor = gradient_factor

    def _next(self, kind: str) -> Any:
        """Return what the trace recorded at this place; None if that is no request of this ``kind``.

        The code then went another way than the trace, and the rest of the record is not used.
        """
        known = next(self._told, None)
        if known is not None and known[0] == kind:
            return known[1]
        self._told = iter(())
        return None

    def is_one_for_each_sample(self, values: Any) -> bool:
        """Return True if values count once for each sample; untraced, if they have a dimension.

        See :meth:`LossTerms.is_one_for_each_sample`.
        """
        known = self._next("reduction")
        return len(values.shape) > 0 if known is None else bool(known)

    def weighed_loss(self, loss: Any) -> Any:
        """Weigh a loss that the user's code has reduced by its degree; see :meth:`LossTerms.weighed_loss`."""
        degree = self._next("loss")
        return loss * self._power(degree, loss) if degree else loss

    def note_exact(self, loss: Any) -> None:
        """Do nothing: the trace has taken ``loss`` into account."""

    def gradient(
        self,
        original: Callable[..., Any],
        tape: Any,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Compute ``tape.gradient(target, sources)``, weighed; see :meth:`LossTerms.gradient`."""
        degrees, of_samples = self._next("gradient") or (None, ())
        targets = tf.nest.flatten(target)
        above = [None] * len(targets) if output_gradients is None else tf.nest.flatten(output_gradients)
        if degrees is None or len(degrees) != len(targets) or len(above) != len(targets):
            factor = self._gradient_factor(target)
            if factor is not None:
                upstream = tf.ones_like(target) if output_gradients is None else output_gradients
                output_gradients = upstream * factor
            return original(tape, target, sources, output_gradients, *rest, **named)
        if any(degrees):
            upstreams = [
                (tf.ones_like(each) if given is None else tf.convert_to_tensor(given)) * self._power(degree, each)
                for each, given, degree in zip(targets, above, degrees, strict=True)
            ]
            output_gradients = tf.nest.pack_sequence_as(target, upstreams)
        gradients = original(tape, target, sources, output_gradients, *rest, **named)
        if not any(of_samples):
            return gradients
        flat = [
            gradient * tf.cast(self._fraction, gradient.dtype) if own and tf.is_tensor(gradient) else gradient
            for gradient, own in zip(tf.nest.flatten(gradients), of_samples, strict=True)
        ]
        return tf.nest.pack_sequence_as(gradients, flat)

    def weighed(self, value: Any) -> Any:
        """Weigh a number of this micro-batch; None where the trace could not. See :meth:`LossTerms.weighed`."""
        if not tf.is_tensor(value) or not value.dtype.is_floating or value.shape.rank:
            return value
        is_traced = self._is_traced
        degree = self._next("number")
        if degree is None:
            return None if is_traced else value
        return value * self._power(degree, value) if degree else value

    def _power(self, degree: Any, like: Any) -> Any:
        return tf.cast((1.0 / self._fraction) ** float(degree or 0), like.dtype)

    def kind_of(self, part: Any) -> LogKind:
        """Return the kind of a part of the logs, as far as its shape shows it; see :meth:`LossTerms.kind_of`."""
        tensor = tf.convert_to_tensor(part)
        if tensor.shape.rank:
            return LogKind.JOINED if int(tensor.shape[0]) == self._samples else LogKind.LAST
        return LogKind.AVERAGED if tensor.dtype.is_floating else LogKind.LAST

    def has_numbers_of_the_batch(self, part: Any) -> bool:
        """Return False: a value does not show its making. See :meth:`LossTerms.has_numbers_of_the_batch`."""
        return False

    def weighed_logs(self, logs: Any, kinds: Sequence[LogKind]) -> Any:
        """Weigh those parts of the logs that are averaged; see :meth:`LossTerms.weighed_logs`."""
        following = iter(kinds)
        flat = []
        for part in tf.nest.flatten(logs):
            is_averaged = part is not None and next(following) is LogKind.AVERAGED
            weighed = self.weighed(tf.convert_to_tensor(part)) if is_averaged else None
            flat.append(part if weighed is None else weighed)
        return tf.nest.pack_sequence_as(logs, flat)
