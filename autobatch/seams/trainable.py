"""State of a model's ``trainable``: as of now, or as of an earlier trace.

Keras looks at ``trainable`` while it traces a step. A change without ``compile`` has no effect before the next trace.
Seen with Keras 3.6 to 3.15; ``tests/seams/test_trainable.py`` fails loudly when a piece moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from autobatch.seams.models import is_traced, layers_of


class TrainableState:
    """The ``trainable`` of a model's layers and variables at one moment. Those that came later have none here."""

    def __init__(self, flags: Iterable[tuple[Any, bool]]) -> None:
        self._flags = {id(owner): (owner, flag) for owner, flag in flags}

    @classmethod
    def of_now(cls, model: Any) -> TrainableState:
        """Note the present state of a model."""
        return cls((owner, bool(owner.trainable)) for owner in _owners(model))

    @classmethod
    def traced_by_keras(cls, model: Any) -> TrainableState | None:
        """Return the state that Keras's own train function was traced in; None if it was not traced, or cannot be told.

        Keras's own ``train_step`` builds the optimizer for all that is trainable in its first trace. Another step may
        train some of it, or use several optimizers, so that the one of ``compile`` tells nothing.
        """
        optimizer = getattr(model, "optimizer", None)
        if getattr(model.train_step, "__func__", None) is not keras.Model.train_step:
            return None
        if not is_traced(getattr(model, "train_function", None)) or not getattr(optimizer, "built", False):
            return None
        trained = {id(getattr(variable, "value", variable)) for variable in _variables_of(optimizer)}
        trained |= {id(variable) for variable in _variables_of(optimizer)}

        def is_trained(variable: Any) -> bool:
            return id(variable) in trained or id(variable.value) in trained

        flags: list[tuple[Any, bool]] = []
        for layer in layers_of(model):
            weights = [weight for each in layers_of(layer) for weight in each._trainable_variables]
            if weights:  # of others the trace does not tell
                flags.append((layer, any(is_trained(weight) for weight in weights)))
        flags += [(variable, is_trained(variable)) for variable in model.weights if _is_weight(variable, is_trained)]
        return cls(flags)

    def joined(self, model: Any) -> TrainableState:
        """Return this state, with the present state of what has come to the model since."""
        return TrainableState([*TrainableState.of_now(model)._flags.values(), *self._flags.values()])

    def agrees(self, other: TrainableState) -> bool:
        """Return True if both states have the same for everything that is in both."""
        pairs = ((flag, other._flags.get(key)) for key, (_, flag) in self._flags.items())
        return all(known is None or known[1] == flag for flag, known in pairs)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the model into this state while the context is open."""
        changed = [(owner, flag) for owner, flag in self._flags.values() if owner._trainable is not flag]
        before = [(owner, owner._trainable) for owner, _ in changed]
        try:
            for owner, flag in changed:
                vars(owner)["_trainable"] = flag  # without what a layer's setter does to all that is in it
            yield
        finally:
            for owner, flag in before:
                vars(owner)["_trainable"] = flag


def _owners(model: Any) -> list[Any]:
    return [*layers_of(model), *model.variables]


def _variables_of(optimizer: Any) -> list[Any]:
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(inner._trainable_variables)


def _is_weight(variable: Any, is_trained: Any) -> bool:
    return bool(variable.trainable or is_trained(variable))
