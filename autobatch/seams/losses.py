"""Replacements of the reductions of Keras's losses while a step is traced."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.losses import loss as _loss_module
from keras.src.trainers.compile_utils import CompileLoss as _CompileLoss

from autobatch.seams.patching import replaced
from autobatch.seams.versions import divisor_of_valid as divisor_of_valid
from autobatch.seams.versions import scalings_of_losses

ReductionHandler = Callable[..., Any]
"""Handler of one reduction, in place of Keras's own ``reduce_weighted_values``.

It takes that function, True if ``compile(loss=...)`` is calling, and the arguments of the call.
"""

apply_mask = _loss_module.apply_mask
squeeze_or_expand = _loss_module.squeeze_or_expand_to_same_rank
standardize_reduction = _loss_module.standardize_reduction


@contextlib.contextmanager
def intercept_reductions(handler: ReductionHandler) -> Iterator[None]:
    """Let ``handler`` reduce the values of every Keras loss, while the context is open.

    Every ``keras.losses.Loss`` calls the module-level ``reduce_weighted_values``. ``handler`` gets that function, True
    if the loss is one of ``compile(loss=...)``, and the call's arguments.
    """
    calling: list[Any] = []

    def handled(original: Callable[..., Any]) -> Callable[..., Any]:
        def reduce_weighted_values(
            values: Any,
            sample_weight: Any = None,
            mask: Any = None,
            reduction: Any = "sum_over_batch_size",
            dtype: Any = None,
        ) -> Any:
            return handler(original, bool(calling), values, sample_weight, mask, reduction, dtype)

        return reduce_weighted_values

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calling.append(self)
            try:
                return original(self, *args, **kwargs)
            finally:
                calling.pop()

        return call

    with replaced(_loss_module, "reduce_weighted_values", handled), replaced(_CompileLoss, "call", noted):
        yield


def added_losses_noted(note: Callable[[Any, Any], None]) -> contextlib.AbstractContextManager[None]:
    """Call ``note`` with each layer that calls ``add_loss`` and what it adds, while the context is open.

    Calls that Keras itself makes for an activity regularizer are not noted.
    """

    def noted(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def add_loss(self: Any, loss: Any) -> Any:
            caller = inspect.currentframe()
            caller = None if caller is None else caller.f_back
            caller = None if caller is None else caller.f_back  # past the one frame of what calls a replacement
            if caller is None or caller.f_code.co_filename != inspect.getfile(keras.layers.Layer):
                note(self, loss)
            return original(self, loss)

        return add_loss

    return replaced(keras.layers.Layer, "add_loss", noted)


@contextlib.contextmanager
def losses_unscaled() -> Iterator[None]:
    """Keep Keras from dividing losses by the number of replicas, while the context is open.

    Each replica is traced on a thread of its own, so this holds on every thread.
    """
    with contextlib.ExitStack() as stack:
        for name in scalings_of_losses():
            stack.enter_context(replaced(_loss_module, name, _as_it_is, on_every_thread=True))
        yield


def _as_it_is(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value
