"""What cannot be the full batch's when gradients are accumulated, said by name before training.

Everything that sees one micro-batch at a time and is no sum over samples differs: no accumulation, whoever writes it,
can change that. The list is made of what is found in the model, not of what might be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from autobatch.trial.snapshot import distinct

MOST_NAMES = 3
"""So many layers are named; of more, their number."""

_LINEAR = ("SGD",)
"""Optimizers whose update is linear in the gradient, so that a repeated embedding row needs no summing beforehand."""


_COMPARING = ("circle",)
"""Keras's losses whose value for a sample depends on the others in the batch."""


def differences(
    model: Any,
    optimizers: tuple[Any, ...],
    scalar_losses: tuple[str, ...] = (),
    tables_kept_as_rows: Sequence[Any] = (),
    scalar_metrics: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Sentences on what in ``model`` depends on the micro-batch; empty where nothing does.

    ``scalar_losses`` and ``scalar_metrics`` name those that were seen to reduce the batch themselves;
    ``tables_kept_as_rows`` are the embeddings' variables whose gradients reach the optimizer as in plain Keras.
    """
    as_rows = {id(table) for table in tables_kept_as_rows}
    layers = list(model._flatten_layers()) if hasattr(model, "_flatten_layers") else []
    found = []
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    if norms:
        found.append(f"{_named(norms)} normalises each micro-batch by its own mean and variance, not the full batch's.")
    random = [layer for layer in layers if getattr(layer, "seed_generator", None) is not None]
    if random:
        found.append(f"{_named(random)} draws other random numbers, one draw for each micro-batch.")
    if len(optimizers) > 1:
        names = ", ".join(optimizer.name for optimizer in optimizers)
        found.append(f"The optimizers {names} update once each, at the end: none sees what another has just changed.")
    embeddings = [
        layer
        for layer in layers
        if isinstance(layer, keras.layers.Embedding)
        and layer.trainable
        and not all(id(table) in as_rows for table in distinct(layer.trainable_weights))
    ]
    adaptive = [optimizer for optimizer in optimizers if type(_innermost(optimizer)).__name__ not in _LINEAR]
    if embeddings and adaptive:
        found.append(
            f"The gradients of a row of {_named(embeddings)} that occurs several times are summed before "
            f"{adaptive[0].name} squares them; Keras's TensorFlow backend squares each by itself."
        )
    comparing = [name for loss in _losses_of(model) if (name := _name_of(loss)) in _COMPARING]
    if comparing:
        found.append(
            f"The loss {', '.join(dict.fromkeys(comparing))} compares samples with each other; it sees those of one "
            "micro-batch at a time."
        )
    if isinstance(model, keras.Model) and type(model).train_step is not keras.Model.train_step:
        found.append(
            f"{type(model).__name__}.train_step: what of its loss is no keras.losses.Loss is taken for a mean over the "
            "samples of a batch, and a sum is weighed as one."
        )
    if scalar_losses:
        found.append(
            f"The loss {', '.join(scalar_losses)} returns one number for a batch; it is averaged over the "
            "micro-batches by their samples, which is not the same where it compares samples with each other."
        )
    if scalar_metrics:
        found.append(
            f"The metric {', '.join(scalar_metrics)} makes one number of a batch; it is averaged over the "
            "micro-batches by their samples, which is the full batch's only where it is a mean over samples."
        )
    return tuple(found)


def _losses_of(model: Any) -> list[Any]:
    """The losses given to ``compile``, and those among the model's attributes, for a ``train_step`` of its own."""
    found = []
    for attribute in vars(model).values():
        parts = attribute if isinstance(attribute, (list, tuple)) else [attribute]
        parts = list(attribute.values()) if isinstance(attribute, dict) else parts
        found += [part for part in parts if isinstance(part, keras.losses.Loss)]
    return [*tf.nest.flatten(getattr(model, "loss", None)), *found]


def _name_of(loss: Any) -> str:
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return str(name).lower()


def _named(layers: list[Any]) -> str:
    kind = type(layers[0]).__name__
    names = ", ".join(layer.name for layer in layers[:MOST_NAMES])
    more = len(layers) - MOST_NAMES
    return f"{kind} ({names}{f' and {more} more' if more > 0 else ''})"


def _innermost(optimizer: Any) -> Any:
    return getattr(optimizer, "inner_optimizer", optimizer)
