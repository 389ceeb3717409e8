"""Weights for what a step differentiates and reports, with which micro-batches add up to the effective batch.

An effective batch of ``n`` samples is cut into micro-batches of ``n_k``. If the loss is a mean over samples, its
gradient is the sum of each micro-batch's own gradient times ``n_k / n`` (the *fraction*). A loss may grow with another
power of the number of samples, its *degree* (:mod:`autobatch.graphs.dependence`). It is multiplied by ``(n / n_k)`` to
that power beforehand: a sum by ``n / n_k``.

Any other number of a batch is a function ``f`` of such sums, as a masked mean is a quotient of two. Its gradient is
``sum_j df/dS_j * dS_j``, where ``df/dS_j`` is taken at the sums of the *effective* batch. So the tape is asked for the
gradients of the sums, with ``df/dS_j`` as upstream gradients. The graph shows the sums that ``df/dS_j`` itself depends
on. These are counted beforehand, in a pass over the micro-batches that computes nothing else. A mask's sum is counted
from the data alone; the mean prediction of a batch takes a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from autobatch.graphs.copies import copied, gradients_of, sources_of
from autobatch.graphs.dependence import Dependence, unknown
from autobatch.graphs.sample_flow import SampleFlow
from autobatch.losses.linear_forms import as_plain_sums
from autobatch.losses.terms import Composition, Maker, Part
from autobatch.losses.totals import LogKind, Mode, Totals
from autobatch.types import Tensor

_EXTREMES = {"Max": LogKind.LARGEST, "Any": LogKind.LARGEST, "Min": LogKind.SMALLEST, "All": LogKind.SMALLEST}
"""Operations whose result for a batch is the largest, or smallest, of those for its parts."""


class LossTerms:
    """Weights for the losses, gradients and logs of one trace on one micro-batch.

    ``fraction`` is the scalar float64 tensor ``n_k / n``, ``samples`` the scalar int64 ``n_k``. ``note`` is called with
    the dependence of each target that was looked at.
    """

    def __init__(
        self,
        totals: Totals,
        fraction: Tensor,
        samples: Any,
        flow: SampleFlow,
        note: Callable[[Dependence], None] = lambda found: None,
    ) -> None:
        self._totals = totals
        self._fraction = fraction
        self._samples = tf.cast(samples, tf.float64)
        self.flow = flow
        self._note = note
        self._maker = Maker(flow, note)
        self.told: list[tuple[str, Any]] = []
        """Requests in their order, each with its degree or another finding; see :mod:`autobatch.losses.eager_terms`."""
        self.counted = 0
        """Count of the numbers that are counted beforehand for these requests."""
        self._total_of: dict[str, Any] = {}
        self._picked_total: dict[str, Any] = {}

    # -- what is asked for ------------------------------------------------------------------------------------------

    def note_exact(self, loss: Any) -> None:
        """Note that ``loss`` is weighed already: it counts like a mean over samples."""
        if _is_symbolic(loss) and loss.shape.rank == 0:
            self.flow.define(loss, Dependence(data=True, weights=True))

    def is_one_for_each_sample(self, values: Any) -> bool:
        """Return True if values count once for each sample, so that their mean depends on the micro-batch's size only.

        Where that is unknown, values with a dimension count so, and so does what is outside of a graph. The dependence
        of the values is noted, with the operations that mixed their samples.
        """
        found = self._is_one_for_each_sample(values)
        self.told.append(("reduction", found))
        return found

    def weighed_loss(self, loss: Any) -> Any:
        """Weigh a loss that the user's code has reduced if it has one degree; else return it, to be followed later."""
        found = self.flow.of(loss) if _is_symbolic(loss) and loss.shape.rank == 0 else unknown("no number")
        degree = found.degree if found.is_plain_sum and not found.mixed else None
        self.told.append(("loss", degree))
        if degree is None:
            return loss
        if degree != 0 and self._totals.mode is Mode.TRAIN:
            loss = loss * tf.cast(self._power(degree), loss.dtype)
        self.note_exact(loss)
        return loss

    def _is_one_for_each_sample(self, values: Any) -> bool:
        if not _is_symbolic(values):
            return True
        found = self.flow.of(values)
        if found.unknown:
            self._note(unknown_within_keras(found))
            return len(values.shape) > 0
        if found.axis is None:
            return False
        if found.degree != 0 or not found.linear or (found.mixed and self._can_be_undone(values)):
            return False
        self._note(found)
        return True

    def _can_be_undone(self, values: Any) -> bool:
        """Return True if samples were mixed only by numbers of the batch, added to each or multiplied with each."""
        if not values.dtype.is_floating:
            return False
        mean = tf.reduce_mean(values)
        return as_plain_sums(mean, self.flow)[0] is not mean

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
        """Compute a weighed ``tape.gradient(target, sources)``.

        Times the micro-batch's fraction, it adds up to the effective batch's gradient.
        """
        targets = tf.nest.flatten(target)
        if not targets or not all(_is_symbolic(each) and each.dtype.is_floating for each in targets):
            return original(tape, target, sources, output_gradients, *rest, **named)
        above = [None] * len(targets) if output_gradients is None else tf.nest.flatten(output_gradients)
        if len(above) != len(targets):
            return original(tape, target, sources, output_gradients, *rest, **named)
        terms = [self._maker.of(each) for each in targets]
        flat_sources = tf.nest.flatten(sources)
        of_samples = [self._is_of_samples(source) for source in flat_sources]
        self.told.append(("gradient", ([None if each is None else each.degree for each in terms], of_samples)))
        if all(each is not None and each.degree == 1 for each in terms) and flat_sources and all(of_samples):
            gradients = original(tape, target, sources, output_gradients, *rest, **named)  # each sample's own
            self._define_gradients(flat_sources, gradients, of_samples)
            return gradients
        pieces: list[tuple[Any, Any]] = []
        for each, term, upstream in zip(targets, terms, above, strict=True):
            pieces += self._weighed_pieces(each, term, upstream)
        unchanged = len(pieces) == len(targets) and all(
            piece is each and upstream is given
            for (piece, upstream), each, given in zip(pieces, targets, above, strict=True)
        )
        if unchanged:
            gradients = original(tape, target, sources, output_gradients, *rest, **named)
        else:
            upstreams = [tf.ones_like(piece) if upstream is None else upstream for piece, upstream in pieces]
            gradients = original(tape, [piece for piece, _ in pieces], sources, upstreams, *rest, **named)
        if any(of_samples):
            gradients = self._of_samples(gradients, of_samples)
        self._define_gradients(flat_sources, gradients, of_samples)
        return gradients

    def weighed(self, value: Any) -> Any:
        """Weigh a number of this micro-batch: times its fraction it adds up to the effective batch's.

        Return None where it is unknown how the number is made.
        """
        if not _is_symbolic(value) or not value.dtype.is_floating or self.flow.of(value).axis is not None:
            return value
        terms = self._maker.of(value, silently=True)
        self.told.append(("number", None if terms is None else terms.degree))
        if terms is None:
            return None
        if terms.degree is not None:
            return value if terms.degree == 0 else value * tf.cast(self._power(terms.degree), value.dtype)
        if value.shape.rank != 0:
            return value
        fresh = [tf.identity(each.tensor) for each in terms.sums]
        value = terms.target
        again = copied(value, [each.tensor for each in terms.sums], fresh)
        of_data = [place for place, each in enumerate(terms.sums) if each.dependence.data]
        slopes = gradients_of(again, [fresh[place] for place in of_data], None)
        curved = sources_of(slopes, fresh)
        # A number without a slope, as one that is rounded or compared, may jump.
        curved |= {place for place, slope in zip(of_data, slopes, strict=True) if slope is None}
        values = []
        for place, each in enumerate(terms.sums):
            if place in of_data and place not in curved:
                values.append(tf.zeros_like(each.tensor))
            else:
                values.append(self._at_total(each))
        result = copied(value, [each.tensor for each in terms.sums], values)
        straight = [place for place in of_data if place not in curved]
        slopes = gradients_of(result, [values[place] for place in straight], None)
        for place, slope in zip(straight, slopes, strict=True):
            if slope is not None:
                part = terms.sums[place]
                share = tf.cast(self._weight(part), part.tensor.dtype)
                here = tf.math.multiply_no_nan(part.tensor, share)  # the mean of no samples is NaN
                result = result + tf.cast(tf.reduce_sum(slope * here), value.dtype)
        return result

    def kind_of(self, part: Any) -> LogKind:
        """Return the rule by which a part of the logs, no metric's result, becomes the effective batch's."""
        if not _is_symbolic(part):
            return LogKind.LAST
        found = self.flow.of(part)
        if found.unknown:
            return LogKind.NOT_TOLD
        if found.axis is not None:
            return LogKind.JOINED if found.axis == 0 and part.shape.rank else LogKind.NOT_TOLD
        if not found.data and found.degree == 0:
            return LogKind.LAST
        if part.op.type in _EXTREMES and self.flow.of(part.op.inputs[0]).axis is not None:
            return _EXTREMES[part.op.type]
        if part.dtype.is_floating:
            scalar = part.shape.rank == 0
            if scalar:
                terms = self._maker.of(part, silently=True)
                told = terms is not None and not (found.mixed and terms.degree is not None)
            else:
                told = not found.mixed and (found.is_plain_sum or not found.data)
            return LogKind.AVERAGED if told else LogKind.NOT_TOLD
        return (
            LogKind.SUMMED if part.dtype.is_integer and found.is_plain_sum and found.degree == 1 else LogKind.NOT_TOLD
        )

    def has_numbers_of_the_batch(self, part: Any) -> bool:
        """Return True if each sample's number is also made of numbers of the batch, which here is the micro-batch."""
        found = self.flow.of(part) if _is_symbolic(part) else Dependence()
        return found.axis is not None and bool(found.added or found.mixed)

    def is_weighed(self, part: Any) -> bool:
        """Return True if a number of the logs is of one degree, so that a factor weighs it."""
        terms = self._maker.of(part, silently=True)
        return terms is not None and terms.degree is not None

    def weighed_logs(self, logs: Any, kinds: Sequence[LogKind]) -> Any:
        """Weigh those parts of a step's logs that are averaged over the micro-batches."""
        following = iter(kinds)
        # tf.nest sorts a dict by its keys, as :class:`autobatch.metrics.merged_logs.MergedLogs` does.
        flat = []
        for part in tf.nest.flatten(logs):
            weighed = None if part is None or next(following) is not LogKind.AVERAGED else self.weighed(part)
            flat.append(part if weighed is None else weighed)
        return tf.nest.pack_sequence_as(logs, flat)

    # -- weights ------------------------------------------------------------------------------------------------------

    def _power(self, degree: Any) -> Any:
        return (1.0 / self._fraction) ** float(degree)

    def _weight(self, part: Part) -> Any:
        """Return the factor with which the part, times the fraction, adds up."""
        if part.count is None:
            return self._power(part.dependence.degree)
        return tf.math.divide_no_nan(part.count, self._picked(part)) / self._fraction

    def _counted_total(self, part: Any) -> Any:
        self.counted += part.shape.num_elements()
        return self._totals.of(part)

    def _picked(self, part: Part) -> Any:
        name = part.tensor.name
        if name not in self._picked_total:
            self._picked_total[name] = self._counted_total(part.count)
        return self._picked_total[name]

    def _at_total(self, part: Part) -> Any:
        """Return the value of the part in the effective batch."""
        tensor = part.tensor
        if not part.dependence.data:
            whole_number = tensor.dtype.is_integer
            value = tf.cast(tensor, tf.float64) * self._power(part.dependence.degree)
            return tf.cast(tf.round(value) if whole_number else value, tensor.dtype)
        if tensor.name not in self._total_of:
            value = tf.cast(tensor, tf.float64)
            if part.count is not None:
                picked = self._picked(part)
                total = tf.math.divide_no_nan(self._counted_total(tf.math.multiply_no_nan(value, part.count)), picked)
            else:
                power = 1.0 - float(part.dependence.degree or 0)
                whole = self._samples if self._totals.mode is Mode.COUNT else self._samples / self._fraction
                total = self._counted_total(value * self._samples**power) / whole**power
            self._total_of[tensor.name] = tf.cast(total, tensor.dtype)
        return self._total_of[tensor.name]

    def _weighed_pieces(self, target: Any, terms: Composition | None, above: Any) -> list[tuple[Any, Any]]:
        """Return the tensors to differentiate in place of ``target``, each with its upstream gradient."""
        if terms is None or terms.degree == 0:
            return [(target, above)]
        if terms.degree is not None:
            upstream = tf.ones_like(target) if above is None else tf.convert_to_tensor(above)
            return [(target, upstream * tf.cast(self._power(terms.degree), upstream.dtype))]
        trained = [place for place, each in enumerate(terms.sums) if each.trained]
        if not trained or (above is not None and terms.target.shape.rank != target.shape.rank):
            return [(target, above)]
        tensors = [each.tensor for each in terms.sums]
        fresh = [tf.identity(tensor) for tensor in tensors]
        slopes = gradients_of(copied(terms.target, tensors, fresh), [fresh[place] for place in trained], above)
        needed = sources_of(slopes, fresh)
        values = [
            self._at_total(each) if place in needed or not each.dependence.data else tf.identity(each.tensor)
            for place, each in enumerate(terms.sums)
        ]
        values = [tf.identity(value) for value in values]
        slopes = gradients_of(copied(terms.target, tensors, values), [values[place] for place in trained], above)
        pieces, anew = [], []
        for place, slope in zip(trained, slopes, strict=True):
            if slope is None:
                continue
            part = terms.sums[place]
            slope = slope * tf.cast(self._weight(part), slope.dtype)
            if terms.leaves and sources_of([part.tensor], terms.leaves):
                anew.append((part.tensor, slope))
            else:
                pieces.append((part.tensor, slope))
        if anew:
            # The tape knows what these sums are made of, but not the sums.
            ends = list({leaf.name: leaf for leaf in terms.leaves}.values())
            through = tf.gradients(
                [tensor for tensor, _ in anew], ends, [slope for _, slope in anew], stop_gradients=ends
            )
            pieces += [(end, slope) for end, slope in zip(ends, through, strict=True) if slope is not None]
        return pieces or [(target, above)]

    # -- gradients of the samples themselves --------------------------------------------------------------------------

    def _is_of_samples(self, source: Any) -> bool:
        return _is_symbolic(source) and source.dtype != tf.resource and self.flow.of(source).axis is not None

    def _of_samples(self, gradients: Any, of_samples: Sequence[bool]) -> Any:
        """Multiply the samples' own gradients by the fraction; other gradients get it when they are added up."""
        flat = tf.nest.flatten(gradients)
        shares = [
            gradient * tf.cast(self._fraction, gradient.dtype) if own and tf.is_tensor(gradient) else gradient
            for gradient, own in zip(flat, of_samples, strict=True)
        ]
        return tf.nest.pack_sequence_as(gradients, shares)

    def _define_gradients(self, sources: Sequence[Any], gradients: Any, of_samples: Sequence[bool]) -> None:
        for source, gradient, own in zip(sources, tf.nest.flatten(gradients), of_samples, strict=True):
            if not _is_symbolic(gradient):
                continue
            if own:
                found = self.flow.of(source)
                self.flow.define(gradient, Dependence(axis=found.axis, data=True, weights=True, parts=found.parts))
            else:
                self.flow.define(gradient, unknown(f"{gradient.op.name} (a gradient)"))


def unknown_within_keras(found: Dependence) -> Dependence:
    """Return ``found`` if samples were set against each other; nothing else matters in a Keras loss's values."""
    return found if found.compares else Dependence(data=True)


def _is_symbolic(tensor: Tensor) -> bool:
    return isinstance(tensor, tf.Tensor) and hasattr(tensor, "graph")
