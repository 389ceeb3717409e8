"""Exact weights for micro-batches, for every reduction, mask and weight of a Keras loss.

An effective batch of ``n`` samples is cut into micro-batches of ``n_k``. If a loss is a mean over samples, its gradient
is the sum over ``k`` of the micro-batch's gradient times ``n_k / n`` (its *fraction*). Regularizers and the losses of
most ``train_step`` functions are such means. A Keras loss may have another denominator, ``D`` for the whole and ``d_k``
for the micro-batch. It is multiplied by ``(d_k / D) / (n_k / n)`` beforehand:

=========================== ================================== =====================
reduction                   denominator ``d``                  factor
=========================== ================================== =====================
``sum_over_batch_size``     elements                           1
the same, with a mask       elements that the mask lets pass   needs a count
``mean_with_sample_weight`` sum of the weights, masked         needs a count
``sum``                     1 for all                          ``n / n_k``
=========================== ================================== =====================

The fraction stands outside. So everything that is not known to be otherwise counts as a mean over samples. Keras's loss
tracker, which weighs a micro-batch's loss by ``n_k``, then ends with the loss of the effective batch.

Nothing is done here under the reduction ``None``, or where the user's own code reduces a loss. What is differentiated
then is weighed by :mod:`autobatch.losses.loss_terms`.

"Needs a count" means that ``D`` depends on the data. :data:`Mode.COUNT` traces the same losses once more and keeps only
the counts. TensorFlow prunes what they do not need.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from autobatch.losses.eager_terms import EagerTerms
from autobatch.losses.loss_terms import LossTerms
from autobatch.losses.totals import Mode, Totals
from autobatch.seams import losses
from autobatch.types import Tensor


class LossWeights:
    """Handler of each loss reduction of one trace; see :func:`autobatch.seams.losses.intercept_reductions`.

    ``fraction`` is the scalar float64 tensor ``n_k / n``. ``totals`` are the effective batch's denominators, one for
    each reduction that needs a count. ``terms`` weigh what the user's own code reduces, wherever that is differentiated
    or reported.
    """

    def __init__(
        self,
        fraction: Tensor,
        totals: Totals,
        terms: LossTerms | None = None,
    ) -> None:
        self.fraction = fraction
        self.totals = totals
        self.terms: LossTerms | EagerTerms | None = terms
        self.leaves_a_vector = False

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
        """Reduce ``values`` as Keras would, times the factor in the module's table."""
        loss = reduce(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
        if self.terms is not None and not self.terms.is_one_for_each_sample(values):
            return self.terms.weighed_loss(loss)  # the user's code has reduced it, in a way that the graph shows
        kind = losses.standardize_reduction(reduction)
        if kind in (None, "none"):
            self.leaves_a_vector = self.leaves_a_vector or of_compile
            return loss
        loss = self._weighed(loss, kind, values, sample_weight, mask, dtype)
        if self.terms is not None:
            self.terms.note_exact(loss)
        return loss

    def _weighed(self, loss: Any, kind: str, values: Any, sample_weight: Any, mask: Any, dtype: Any) -> Any:
        if kind == "sum":
            return loss if self.totals.mode is Mode.COUNT else loss * tf.cast(1.0 / self.fraction, loss.dtype)
        if not self._needs_count(kind, values, sample_weight, mask):
            return loss
        count = tf.cast(self._count(kind, values, sample_weight, mask, dtype), tf.float64)
        total = self.totals.of(count)
        if self.totals.mode is Mode.COUNT:
            return loss
        if kind != "mean_with_sample_weight":
            count, total = (losses.divisor_of_valid(valid, loss.dtype) for valid in (count, total))
        share = tf.math.divide_no_nan(count, total)
        return loss * tf.cast(share / self.fraction, loss.dtype)

    def gradient_factor(self, target: Any) -> Any:
        """Return the factor for the gradient of ``target`` where no graph shows it; None if it stays as it is."""
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
            # A mask entry stands for as many elements in every micro-batch, so valid entries can be counted instead.
            return tf.reduce_sum(tf.cast(mask, tf.float64))
        values = tf.convert_to_tensor(values)
        weight = None if sample_weight is None else tf.cast(sample_weight, values.dtype)
        weight = losses.apply_mask(weight, mask, dtype=values.dtype, reduction=kind)
        _, weight = losses.squeeze_or_expand(values, weight)
        return tf.reduce_sum(tf.cast(weight, tf.float64))
