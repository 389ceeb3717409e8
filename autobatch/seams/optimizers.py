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

from autobatch.seams.patching import replaced, replaced_in_each

ApplyHandler = Callable[[Any, list[Any], list[Any]], None]
"""Takes the optimizer, the gradients and their variables in place of ``optimizer.apply``."""


class _Here(threading.local):
    """The state of this thread's captures and updates."""

    def __init__(self) -> None:
        self.updates = 0
        """Calls of :func:`apply_of`'s result that are under way."""
        self.replaced: dict[int, Callable[..., Any]] = {}
        """By the optimizer's id, the ``apply`` of an instance that :func:`capture_apply` has replaced."""


_HERE = _Here()


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
    set on the instance is replaced as well. On other threads optimizers update their variables.
    """

    def take(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
        variables = optimizer._trainable_variables if trainable_variables is None else trainable_variables
        handler(optimizer, list(grads), list(variables))

    def replacement_for(original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            return (original if _HERE.updates else take)(*args, **kwargs)

        return apply

    def take_from(optimizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        _HERE.replaced = {**_HERE.replaced, id(optimizer): original}
        return functools.partial(take, optimizer)

    before = _HERE.replaced
    with replaced_in_each(_classes_with_apply(), "apply", replacement_for), contextlib.ExitStack() as on_instances:
        for optimizer in optimizers:
            if "apply" in vars(optimizer):
                make = functools.partial(take_from, optimizer)
                on_instances.enter_context(replaced(optimizer, "apply", make))
        try:
            yield
        finally:
            _HERE.replaced = before


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
        own = _HERE.replaced.get(id(optimizer))
        _HERE.updates += 1
        try:
            (functools.partial(type(optimizer).apply, optimizer) if own is None else own)(gradients, variables)
        finally:
            _HERE.updates -= 1

    return apply


def gradients_already_reduced(optimizers: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """While this lasts, the optimizers' ``apply`` takes gradients for the sums over all replicas, as they are.

    Keras sums them itself, but after clipping, which is not what one device would do.
    """
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in optimizers]
    touched = [one for one in (*optimizers, *inner) if one is not None]
    return replaced_in_each(touched, "_all_reduce_sum_gradients", lambda original: list, on_every_thread=True)
