"""What cannot be the full batch's when gradients are accumulated, said by name before training.

Everything that sees one micro-batch at a time and is no sum over samples differs: no accumulation, whoever writes it,
can change that. The list is made of what is found in the model, not of what might be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from autobatch.train import keras_seams, whole_batch_metrics
from autobatch.train.traced import Traced
from autobatch.trial.snapshot import components, distinct

MOST_NAMES = 3
"""So many layers are named; of more, their number."""

_MOST_VARIABLES = 6
"""So many variables are named; of more, their number."""

_RATES = ("rate", "dropout", "recurrent_dropout", "stddev")
"""By these Keras's layers tell how much they draw; at zero they draw nothing."""

_LINEAR = ("SGD",)
"""Optimizers whose update is linear in the gradient, so that a repeated embedding row needs no summing beforehand."""

_COMPARING = ("circle",)
"""Keras's losses whose value for a sample depends on the others in the batch."""


def differences(
    model: Any,
    optimizers: tuple[Any, ...],
    traced: Traced | None = None,
    tables_kept_as_rows: Sequence[Any] = (),
    written: Sequence[Any] = (),
) -> tuple[str, ...]:
    """Sentences on what in ``model`` depends on the micro-batch; empty where nothing does.

    ``traced`` is what the trace of the micro-step has shown, None before it; ``tables_kept_as_rows`` are the
    embeddings' variables whose gradients reach the optimizer as in plain Keras; ``written`` the variables that a
    micro-step writes.
    """
    traced = traced or Traced()
    as_rows = {id(table) for table in tables_kept_as_rows}
    layers = keras_seams.layers_of(model)
    found = []
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    if norms:
        found.append(f"{_named(norms)} normalises each micro-batch by its own mean and variance, not the full batch's.")
    random = [layer for layer in layers if _draws(layer)]
    if random:
        found.append(f"{_named(random)} draws other random numbers, one draw for each micro-batch.")
    if len(optimizers) > 1:
        names = ", ".join(optimizer.name for optimizer in optimizers)
        found.append(f"The optimizers {names} update once each, at the end: none sees what another has just changed.")
    if traced.changed_for:
        names = ", ".join(optimizer.name for optimizer in traced.changed_for)
        found.append(
            f"The gradients are changed before {names} gets them, by clipping say: that acts on those of each "
            "micro-batch. What the optimizer does itself (clipnorm, global_clipnorm, clipvalue) acts on the update's."
        )
    found += _changed_by_the_step(model, layers, optimizers, written)
    embeddings = [
        layer
        for layer in layers
        if isinstance(layer, keras.layers.Embedding)
        and layer.trainable
        and not all(id(table) in as_rows for table in distinct(layer.trainable_weights))
    ]
    summed = [(optimizer, verb) for optimizer in optimizers if (verb := _done_to_each_row(_innermost(optimizer)))]
    if embeddings and summed:
        optimizer, verb = summed[0]
        found.append(
            f"The gradients of a row of {_named(embeddings)} that occurs several times are summed before "
            f"{optimizer.name} {verb} them; Keras's TensorFlow backend {verb} each by itself."
        )
    comparing = [name for loss in _losses_of(model) if (name := _name_of(loss)) in _COMPARING]
    if comparing:
        found.append(
            f"The loss {', '.join(dict.fromkeys(comparing))} compares samples with each other; it sees those of one "
            "micro-batch at a time."
        )
    elif traced.comparing:
        found.append(
            f"The loss compares samples with each other, in {traced.comparing}; it sees those of one micro-batch at a "
            "time."
        )
    own = _own_loss_code(model)
    if own and not traced.is_keras_alone:
        found.append(
            f"{own}: what of its loss is no keras.losses.Loss is taken for a mean over the samples of a batch, and a "
            "sum is weighed as one."
        )
    if traced.adding_layers:
        found.append(
            f"What {_named(traced.adding_layers)} adds by add_loss is taken for a mean over the samples of a batch, "
            "and a sum is weighed as one; what compares samples sees those of one micro-batch at a time."
        )
    if traced.scalar_losses:
        found.append(
            f"The loss {', '.join(traced.scalar_losses)} returns one number for a batch; it is averaged over the "
            "micro-batches by their samples, which is not the same where it compares samples with each other."
        )
    if traced.scalar_metrics:
        found.append(
            f"The metric {', '.join(traced.scalar_metrics)} makes one number of a batch; it is averaged over the "
            "micro-batches by their samples, which is the full batch's only where it is a mean over samples."
        )
    found += whole_batch_metrics.sentences(traced.updated_in_parts)
    return tuple(found)


def _draws(layer: Any) -> bool:
    """Whether a layer draws random numbers in training: it has a generator, and its rates are not all zero."""
    generators = [part for part in vars(layer).values() if isinstance(part, keras.random.SeedGenerator)]
    library_class = next(cls for cls in type(layer).__mro__ if cls.__module__.partition(".")[0] == "keras")
    rates = (
        [] if library_class in (keras.layers.Layer, keras.Model) else [getattr(layer, name, None) for name in _RATES]
    )
    known = [rate for rate in rates if isinstance(rate, (int, float))]
    return bool(generators) and (not known or any(rate > 0 for rate in known))


def _done_to_each_row(optimizer: Any) -> str:
    """What an optimizer does to gradients that is not the same for a sum as for its parts; empty if nothing."""
    if type(optimizer).__name__ not in _LINEAR:
        return "squares"
    clipping = [getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue")]
    return "clips" if any(clipping) else ""


def _own_loss_code(model: Any) -> str:
    """What of the user's computes the loss, in words; empty where Keras does."""
    if not isinstance(model, keras.Model):
        return "The train_step of this loop"
    for name in ("train_step", "compute_loss"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            return f"{type(model).__name__}.{name}"
    return ""


def _changed_by_the_step(model: Any, layers: list[Any], optimizers: Sequence[Any], written: Sequence[Any]) -> list[str]:
    """Sentences on the variables that the user's own code changes in each micro-step."""
    named = [variable for metric in model.metrics for variable in metric.variables]
    named += [variable for optimizer in optimizers for variable in optimizer.variables]
    spectral = []
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            named += layer.non_trainable_variables
        if isinstance(layer, keras.layers.SpectralNormalization):
            spectral.append(layer)
            named += layer.variables
    apart = {id(variable) for variable in components(named)}
    changed = [
        variable
        for variable in written
        if id(variable) not in apart and not _is_seed(variable) and not _is_of_a_metric(variable)
    ]
    found = []
    if spectral and any(id(variable) in apart for variable in written):
        found.append(f"{_named(spectral)} changes its kernel once for each micro-batch, not once for each update.")
    if changed:
        remaining = {id(variable): variable.name.partition(":")[0] for variable in changed}
        own = [
            variable.path
            for variable in model.variables
            for part in components([variable])
            if remaining.pop(id(part), "")
        ]
        names = list(dict.fromkeys([*own, *remaining.values()]))
        more = len(names) - _MOST_VARIABLES
        found.append(
            f"train_step changes {', '.join(names[:_MOST_VARIABLES])}{f' and {more} more' if more > 0 else ''} itself: "
            "once for each micro-batch, not once for each update."
        )
    return found


def _is_seed(variable: Any) -> bool:
    return "seed_generator_state" in str(variable.name)


def _is_of_a_metric(variable: Any) -> bool:
    """Whether it is of a metric that the model does not know: Keras makes their variables to be summed."""
    return bool(variable.aggregation == tf.VariableAggregation.SUM)


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
