"""Replacements of ``GradientTape.gradient`` while a step is traced, and the gradients that a trace registers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as _ops

from autobatch.seams.patching import replaced


def _gradient_replaced(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> contextlib.AbstractContextManager[None]:
    """Replace ``GradientTape.gradient`` by what ``make`` makes of it, while the context is open.

    Calls within a gradient reach the original: code that recomputes a part of a forward pass asks another tape for its
    own gradients.
    """
    within: list[bool] = []

    def outermost(original: Callable[..., Any]) -> Callable[..., Any]:
        replacement = make(original)

        def gradient(*args: Any, **named: Any) -> Any:
            if within:
                return original(*args, **named)
            within.append(True)
            try:
                return replacement(*args, **named)
            finally:
                within.pop()

        return gradient

    return replaced(tf.GradientTape, "gradient", outermost)


def gradients_weighed(
    weigh: Callable[..., Any], note: Callable[[Any, Any], None]
) -> contextlib.AbstractContextManager[None]:
    """Replace ``GradientTape.gradient`` by ``weigh(original, tape, target, sources, ...)``, while the context is open.

    ``note`` gets every target and its gradients.
    """

    def weighed(original: Callable[..., Any]) -> Callable[..., Any]:
        def gradient(self: Any, target: Any, sources: Any, *rest: Any, **named: Any) -> Any:
            gradients = weigh(original, self, target, sources, *rest, **named)
            note(target, gradients)
            return gradients

        return gradient

    return _gradient_replaced(weighed)


def without_gradients(weigh: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Replace the gradients of variables by zeros while the context is open, so that only a forward pass is traced.

    ``weigh`` is called as under :func:`gradients_weighed`; its ``original`` makes zeros. Gradients of other tensors,
    which a loss may be made of, stay as they are.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def zeros(tape: Any, target: Any, sources: Any, *rest: Any, **named: Any) -> Any:
            if any(isinstance(source, tf.Tensor) for source in tf.nest.flatten(sources)):
                return original(tape, target, sources, *rest, **named)
            return tf.nest.map_structure(lambda source: tf.zeros(source.shape, source.dtype), sources)

        def gradient(self: Any, target: Any, sources: Any, *rest: Any, **named: Any) -> Any:
            return weigh(zeros, self, target, sources, *rest, **named)

        return gradient

    return _gradient_replaced(replacement)


@contextlib.contextmanager
def registered_while_alive(owner: Any) -> Iterator[None]:
    """Forget the custom gradients that are registered while the context is open, once ``owner`` is gone.

    TensorFlow registers one for each call of ``tf.custom_gradient`` in a trace, as ``tf.nn.silu`` makes one, and keeps
    it for good. By it the graph stays, and the memory of all variables that the graph touches.
    """
    registered = _ops.gradient_registry._registry
    known = set(registered)
    try:
        yield
    finally:
        names = [name for name in registered if name not in known and name.startswith("CustomGradient-")]
        if names:
            weakref.finalize(owner, _forget, registered, names).atexit = False


def _forget(registered: dict[str, Any], names: list[str]) -> None:
    for name in names:
        registered.pop(name, None)
