"""Optimizers of a step: those known beforehand, and the capture of their ``apply`` while the step is traced.

Seen with Keras 3.6 to 3.15. ``tests/seams/test_keras.py`` fails loudly when a piece moves.
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
"""Handler that takes the optimizer, the gradients and their variables in place of ``optimizer.apply``."""


class _Captured(threading.local):
    """The state of this thread's captures and updates."""

    def __init__(self) -> None:
        self.updates = 0
        """Number of calls under way of functions that :func:`apply_of` has returned."""
        self.replaced: dict[int, Callable[..., Any]] = {}
        """Own ``apply`` of each instance on which :func:`capture_apply` has replaced it, by the optimizer's id."""


_HERE = _Captured()


def optimizers_of(model: Any) -> tuple[Any, ...]:
    """Return the optimizers that a model's ``train_step`` is known to call: ``model.optimizer`` and further attributes.

    Lists, tuples and dicts among the model's attributes are searched as well. A ``LossScaleOptimizer`` counts; the
    optimizer that it wraps does not.
    """
    found: list[Any] = []
    candidates = [getattr(model, "optimizer", None)]
    for attribute in vars(model).values():
        if isinstance(attribute, dict):
            candidates.extend(attribute.values())
        elif isinstance(attribute, (list, tuple)):
            candidates.extend(attribute)  # TensorFlow wraps tuples, and a wrapper takes no part in +=
        else:
            candidates.append(attribute)
    for candidate in candidates:
        if isinstance(candidate, keras.optimizers.Optimizer) and all(candidate is not known for known in found):
            found.append(candidate)
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in found]
    return tuple(optimizer for optimizer in found if all(optimizer is not wrapped for wrapped in inner))


@contextlib.contextmanager
def capture_apply(optimizers: Sequence[Any], handler: ApplyHandler) -> Iterator[None]:
    """Let ``handler`` take the gradients of any optimizer's ``apply`` in place of an update, while the context is open.

    ``apply_gradients`` goes through ``apply`` as well. Every class that defines ``apply`` is patched, so that unknown
    optimizers are captured too. Only the outermost call is captured: that of the user's subclass or of a
    ``LossScaleOptimizer``, not the calls that it makes in turn.

    ``optimizers`` are searched for an ``apply`` that the user has set on the instance, which is replaced as well. On
    other threads optimizers update their variables.
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
    """Return every class, mixins included, that an optimizer existing now may get its ``apply`` from."""
    found: dict[Any, None] = {}
    pending: list[Any] = [keras.optimizers.Optimizer]
    while pending:
        optimizer_class = pending.pop()
        pending += optimizer_class.__subclasses__()
        own = (cls for cls in optimizer_class.__mro__ if inspect.isfunction(vars(cls).get("apply")))
        found.update(dict.fromkeys(own))
    return list(found)


def apply_of(optimizer: Any) -> Callable[..., None]:
    """Return the ``apply`` that :func:`capture_apply` has replaced: the class's, or the user's own on the instance."""

    def apply(gradients: list[Any], variables: list[Any]) -> None:
        own = _HERE.replaced.get(id(optimizer))
        _HERE.updates += 1
        try:
            (functools.partial(type(optimizer).apply, optimizer) if own is None else own)(gradients, variables)
        finally:
            _HERE.updates -= 1

    return apply


def gradients_already_reduced(optimizers: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Let the optimizers' ``apply`` take gradients as sums over all replicas already, while the context is open.

    Keras sums them itself, but after clipping: one device would clip the sum.

    On one device there is nothing to sum. But TensorFlow keeps the gradient of that sum for good, and by it the graph,
    and the weights and slots that it touches: every training would leave them in the device's memory. What is forgotten
    with a step (``registered_while_alive``) goes a collection later, behind the next search.
    """
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in optimizers]
    touched = [one for one in (*optimizers, *inner) if one is not None]
    return replaced_in_each(touched, "_all_reduce_sum_gradients", lambda original: list, on_every_thread=True)
