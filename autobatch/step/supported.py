"""Refusal of models that cannot be trained here, with the reason and the remedy."""

from __future__ import annotations

import keras

from autobatch.seams import strategies
from autobatch.seams.models import layers_of
from autobatch.types import Model


def require_supported(model: Model) -> None:
    """Refuse models that cannot be trained through Keras's own ``fit``.

    Raises:
        ValueError: the distribution strategy that the model was made under is not supported, or cannot train this
            model; or the model makes its own train function, or is stateful (see :func:`require_stateless`).
    """
    strategies.require_supported_strategy(model)
    if getattr(type(model), "make_train_function", None) is not keras.Model.make_train_function:
        raise ValueError(
            "This model overrides make_train_function, which autobatch would pass by. Put what it does in train_step. "
            f"Received: {type(model).__name__}"
        )
    require_stateless(model)


def require_stateless(model: Model) -> None:
    """Refuse recurrent layers that hand each sample's state to the sample in the same place of the next batch.

    Raises:
        ValueError: there are such layers; it names them.
    """
    stateful = [layer.name for layer in layers_of(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    if stateful:
        raise ValueError(
            "A recurrent layer with stateful=True hands each sample's state to the sample in the same place of the "
            "next batch; cut into micro-batches, it would go to another sample of the same batch. Set stateful=False, "
            f"or train this model by Model.fit. Received: {', '.join(stateful)}"
        )
