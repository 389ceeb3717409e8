"""Replace the reductions of Keras's losses while a step is traced."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.losses import loss as _loss_module
from keras.src.trainers.compile_utils import CompileLoss as _CompileLoss

from autobatch.seams.patching import PATCHING, on_this_thread

ReductionHandler = Callable[..., Any]
"""Takes Keras's own ``reduce_weighted_values``, whether ``compile(loss=...)`` is calling, and its arguments."""

apply_mask = _loss_module.apply_mask
squeeze_or_expand = _loss_module.squeeze_or_expand_to_same_rank
standardize_reduction = _loss_module.standardize_reduction

_UNSCALING = threading.RLock()
"""Held in :func:`losses_unscaled`, within which replicas are traced on threads of their own that take the others."""


@contextlib.contextmanager
def intercept_reductions(handler: ReductionHandler) -> Iterator[None]:
    """While this lasts, every Keras loss reduces its values through ``handler``.

    Every ``keras.losses.Loss`` calls the module-level ``reduce_weighted_values``; ``handler`` gets that function, a
    flag that tells whether the loss is one of ``compile(loss=...)``, and the call's arguments.
    """
    calling: list[Any] = []

    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: Any = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        return handler(original_reduce, bool(calling), values, sample_weight, mask, reduction, dtype)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calling.append(self)
        try:
            return original_call(self, *args, **kwargs)
        finally:
            calling.pop()

    with PATCHING:
        original_reduce = _loss_module.reduce_weighted_values
        original_call = _CompileLoss.call
        _loss_module.reduce_weighted_values = on_this_thread(original_reduce, reduce_weighted_values)
        _CompileLoss.call = on_this_thread(original_call, call)
        try:
            yield
        finally:
            _loss_module.reduce_weighted_values = original_reduce
            _CompileLoss.call = original_call


@contextlib.contextmanager
def added_losses_noted(note: Callable[[Any, Any], None]) -> Iterator[None]:
    """While this lasts, ``note`` is told each layer that calls ``add_loss``, and what it adds.

    Keras's own call, for an activity regularizer, is none of the layer's.
    """
    with PATCHING:
        original = keras.layers.Layer.add_loss

        def add_loss(self: Any, loss: Any) -> Any:
            caller = inspect.currentframe()
            caller = None if caller is None else caller.f_back
            caller = None if caller is None else caller.f_back  # past what tells the threads apart
            if caller is None or caller.f_code.co_filename != inspect.getfile(keras.layers.Layer):
                note(self, loss)
            return original(self, loss)

        keras.layers.Layer.add_loss = on_this_thread(original, add_loss)
        try:
            yield
        finally:
            keras.layers.Layer.add_loss = original


@contextlib.contextmanager
def losses_unscaled() -> Iterator[None]:
    """While this lasts, a Keras loss is that of its samples, not divided by the number of replicas."""
    with _UNSCALING:
        originals = _loss_module.scale_loss_for_distribution, _loss_module.unscale_loss_for_distribution
        _loss_module.scale_loss_for_distribution = _loss_module.unscale_loss_for_distribution = lambda value: value
        try:
            yield
        finally:
            _loss_module.scale_loss_for_distribution, _loss_module.unscale_loss_for_distribution = originals
