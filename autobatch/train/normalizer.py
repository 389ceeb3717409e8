"""Exact weights for micro-batches, for every reduction, mask and weight of a Keras loss.

An effective batch of ``n`` samples is cut into micro-batches of ``n_k``. Its gradient is the sum over ``k`` of the
micro-batch's gradient times ``n_k / n`` (its *fraction*) wherever a loss is a mean over samples, as regularizers and
the losses of most ``train_step`` functions are. A Keras loss whose denominator is something else, ``D`` for the whole
and ``d_k`` for the micro-batch, is multiplied by ``(d_k / D) / (n_k / n)`` beforehand:

=========================== ================================== =====================
reduction                   denominator ``d``                  factor
=========================== ================================== =====================
``sum_over_batch_size``     elements                           1
the same, with a mask       elements that the mask lets pass   needs a count
``mean_with_sample_weight`` sum of the weights, masked         needs a count
``sum``                     1 for all                          ``n / n_k``
=========================== ================================== =====================

The fraction stands outside, so that everything that is not known to be otherwise is a mean over samples, and so that
Keras's loss tracker, which weighs a micro-batch's loss by ``n_k``, ends with the loss of the effective batch.

Under ``None`` the whole loss is a vector of one value for each sample, to each of which Keras adds the other outputs'
losses. It reports their mean and differentiates their sum, so that the factor ``n / n_k`` is the gradient's alone, and
that of the whole loss (:func:`keras_seams.vectors_differentiated`).

"Needs a count" means that ``D`` depends on the data: :data:`Mode.COUNT` traces the same losses once more, keeping only
the counts; TensorFlow prunes what they do not need.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.train import keras_seams


class Mode(enum.Enum):
    """What a trace is for: training with known totals, or counting them."""

    TRAIN = "train"
    COUNT = "count"


class Normalizer:
    """Handles each loss reduction of one trace; see :func:`keras_seams.intercept_reductions`.

    ``fraction`` is the scalar float64 tensor ``n_k / n``; ``totals`` a float64 vector of the effective batch's
    denominators, one for each reduction that needs a count, in the order of the calls. ``note_loss`` is told every
    loss that is weighed exactly. After a trace ``counts`` holds this micro-batch's own.
    """

    def __init__(
        self, mode: Mode, fraction: Any, totals: Any, note_loss: Callable[[Any], None] = lambda loss: None
    ) -> None:
        self.mode = mode
        self.fraction = fraction
        self.totals = totals
        self._note_loss = note_loss
        self.counts: list[Any] = []
        self.scalar_losses: list[str] = []
        self.leaves_a_vector = False

    @property
    def scalar_loss_names(self) -> tuple[str, ...]:
        """The losses that had reduced the batch themselves, each once."""
        return tuple(dict.fromkeys(self.scalar_losses))

    def __call__(
        self,
        reduce: Any,
        of_compile: bool,
        values: Any,
        sample_weight: Any,
        mask: Any,
        reduction: Any,
        dtype: Any,
    ) -> Any:
        """Reduce ``values`` as Keras would, times the factor of the table above."""
        if len(values.shape) == 0:
            name = "" if tf.executing_eagerly() else values.name
            self.scalar_losses.append(name.rsplit("/", 2)[-2] if "/" in name else "without a name")
        loss = reduce(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
        kind = keras_seams.standardize_reduction(reduction)
        if kind in (None, "none"):
            if not of_compile:
                return loss  # the user's train_step reduces it, by a mean for all we can know
            self.leaves_a_vector = True
        else:
            loss = self._weighed(loss, kind, values, sample_weight, mask, dtype)
        self._note_loss(loss)
        return loss

    def _weighed(self, loss: Any, kind: str, values: Any, sample_weight: Any, mask: Any, dtype: Any) -> Any:
        if kind == "sum":
            return loss * tf.cast(1.0 / self.fraction, loss.dtype)
        if not self._needs_count(kind, values, sample_weight, mask):
            return loss
        count = tf.cast(self._count(kind, values, sample_weight, mask, dtype), tf.float64)
        position = len(self.counts)
        self.counts.append(count)
        if self.mode is Mode.COUNT:
            return loss
        share = tf.math.divide_no_nan(count, self.totals[position])
        return loss * tf.cast(share / self.fraction, loss.dtype)

    def gradient_factor(self, target: Any) -> Any:
        """What the gradient of ``target`` is to be multiplied by; None for what is no vector left by a loss."""
        if not self.leaves_a_vector or not tf.is_tensor(target) or not target.shape.rank:
            return None
        return tf.cast(1.0 / self.fraction, target.dtype)

    @staticmethod
    def _needs_count(kind: str, values: Any, sample_weight: Any, mask: Any) -> bool:
        if len(values.shape) == 0:
            return False  # reduced by the user's own loss function already; Keras passes it on as it is
        if mask is not None:
            return True
        return kind == "mean_with_sample_weight" and sample_weight is not None

    @staticmethod
    def _count(kind: str, values: Any, sample_weight: Any, mask: Any, dtype: Any) -> Any:
        if kind != "mean_with_sample_weight":
            # Elements per mask entry are the same in every micro-batch, so that valid entries stand for elements.
            return tf.reduce_sum(tf.cast(mask, tf.float64))
        values = tf.convert_to_tensor(values)
        weight = None if sample_weight is None else tf.cast(sample_weight, values.dtype)
        weight = keras_seams.apply_mask(weight, mask, dtype=values.dtype, reduction=kind)
        _, weight = keras_seams.squeeze_or_expand(values, weight)
        return tf.reduce_sum(tf.cast(weight, tf.float64))
