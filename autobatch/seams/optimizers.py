"""The optimizers of a step: which are known beforehand, and how their ``apply`` is taken from them while it is traced.

Seen with Keras 3.14 and 3.15. ``tests/seams/test_keras.py`` fails loudly when a piece moves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from autobatch.seams.patching import PATCHING, on_this_thread

ApplyHandler = Callable[[Any, list[Any], list[Any]], None]
"""Takes the optimizer, the gradients and their variables in place of ``optimizer.apply``."""

_REPLACED: dict[int, Any] = {}
"""By the optimizer's id, the ``apply`` that the user has set on the instance and :func:`capture_apply` has replaced."""


class _Updating(threading.local):
    """How many calls of :func:`apply_of`'s result are under way on this thread."""

    depth = 0


_UPDATING = _Updating()


def optimizers_of(model: Any) -> tuple[Any, ...]:
    """The optimizers that a ``train_step`` of this model is known to call: ``model.optimizer`` and its attributes.

    Of a ``LossScaleOptimizer`` and the optimizer that it wraps only the outer one counts.
    """
    found: list[Any] = []
    candidates = [getattr(model, "optimizer", None)]
    for attribute in vars(model).values():
        if isinstance(attribute, dict):
            candidates += attribute.values()
        elif isinstance(attribute, (list, tuple)):
            candidates += attribute
        else:
            candidates.append(attribute)
    for candidate in candidates:
        if isinstance(candidate, keras.optimizers.Optimizer) and all(candidate is not known for known in found):
            found.append(candidate)
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in found]
    return tuple(optimizer for optimizer in found if all(optimizer is not wrapped for wrapped in inner))


@contextlib.contextmanager
def capture_apply(optimizers: Sequence[Any], handler: ApplyHandler) -> Iterator[None]:
    """While this lasts, the ``apply`` of any optimizer hands its gradients to ``handler`` instead of updating anything.

    ``apply_gradients`` goes through ``apply`` as well. It is replaced in every class that has one, so that optimizers
    nobody knew of are captured too, and the outermost is: that of a subclass of the user's, and of a
    ``LossScaleOptimizer``, not what they call in turn. ``optimizers`` are those on which an ``apply`` that the user has
    set on the instance is replaced as well. Other threads' optimizers update as ever.
    """

    def take(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
        variables = optimizer._trainable_variables if trainable_variables is None else trainable_variables
        handler(optimizer, list(grads), list(variables))

    def replacement_for(original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            return (original if _UPDATING.depth else take)(*args, **kwargs)

        return on_this_thread(original, apply)

    with PATCHING:
        originals = [(cls, vars(cls)["apply"]) for cls in _classes_with_apply()]
        on_instances = [optimizer for optimizer in optimizers if "apply" in vars(optimizer)]
        for cls, original in originals:
            cls.apply = replacement_for(original)
        for optimizer in on_instances:
            own = _REPLACED[id(optimizer)] = vars(optimizer)["apply"]
            vars(optimizer)["apply"] = on_this_thread(own, functools.partial(take, optimizer))
        try:
            yield
        finally:
            for optimizer in on_instances:
                vars(optimizer)["apply"] = _REPLACED.pop(id(optimizer))
            for cls, original in originals:
                cls.apply = original


def _classes_with_apply() -> list[Any]:
    """Every class that an optimizer there can be now may get its ``apply`` from, those mixed in among them."""
    found: dict[Any, None] = {}
    pending: list[Any] = [keras.optimizers.Optimizer]
    while pending:
        optimizer_class = pending.pop()
        pending += optimizer_class.__subclasses__()
        own = (cls for cls in optimizer_class.__mro__ if inspect.isfunction(vars(cls).get("apply")))
        found.update(dict.fromkeys(own))
    return list(found)


def apply_of(optimizer: Any) -> Callable[..., None]:
    """The ``apply`` that :func:`capture_apply` has replaced: the class's, or one that the user set on the instance."""

    def apply(gradients: list[Any], variables: list[Any]) -> None:
        own = _REPLACED.get(id(optimizer))
        _UPDATING.depth += 1
        try:
            (functools.partial(type(optimizer).apply, optimizer) if own is None else own)(gradients, variables)
        finally:
            _UPDATING.depth -= 1

    return apply


@contextlib.contextmanager
def gradients_already_reduced(optimizers: Sequence[Any]) -> Iterator[None]:
    """While this lasts, the optimizers' ``apply`` takes gradients for the sums over all replicas, as they are.

    Keras sums them itself, but after clipping, which is not what one device would do.
    """
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in optimizers]
    touched = [one for one in (*optimizers, *inner) if one is not None]
    for one in touched:
        one.__dict__["_all_reduce_sum_gradients"] = lambda pairs: list(pairs)
    try:
        yield
    finally:
        for one in touched:
            del one.__dict__["_all_reduce_sum_gradients"]
