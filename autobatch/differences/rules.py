"""Differences from the full batch that accumulation cannot avoid, named before training.

Everything that sees one micro-batch at a time and is no sum over samples differs. No accumulation can change that.
The list holds what is found in the model and in the trace of its step, not what might be there. If neither shows it
for certain, the sentence says "may". ``docs/exactness-and-limits.md`` explains each kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from autobatch.differences.difference import Difference
from autobatch.differences.naming import listed, named, named_pairs, the_optimizer
from autobatch.differences.trace_findings import TraceFindings
from autobatch.graphs.draws import DrawKind
from autobatch.metrics import whole_batch
from autobatch.seams import models
from autobatch.tensors.variables import components, distinct
from autobatch.types import Layer, Model, Optimizer, Variable

_MOST_VARIABLES = 6
"""Most variables that a sentence names; it counts the others."""

_RATES = ("rate", "dropout", "recurrent_dropout", "stddev")
"""Attributes of Keras's layers that say how much they draw; at zero they draw nothing."""

_LINEAR = ("SGD",)
"""Optimizers whose update is linear in the gradient, so that a repeated embedding row needs no summing beforehand."""

_COMPARING = ("circle",)
"""Keras's losses whose value for a sample depends on the others in the batch."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model, and the findings about its micro-step."""

    model: Model
    layers: list[Layer]
    optimizers: tuple[Optimizer, ...]
    traced: TraceFindings
    tables_kept_as_rows: Sequence[Any]
    written: Sequence[Variable]


def differences(
    model: Model,
    optimizers: tuple[Optimizer, ...],
    traced: TraceFindings | None = None,
    tables_kept_as_rows: Sequence[Any] = (),
    written: Sequence[Variable] = (),
) -> tuple[str, ...]:
    """Return sentences on what in ``model`` depends on the micro-batch; none if nothing does.

    ``traced`` holds the findings from the trace of the micro-step, None before it. ``tables_kept_as_rows`` are the
    embeddings' variables whose gradients reach the optimizer as in plain Keras. ``written`` are the variables that a
    micro-step writes.
    """
    layers = models.layers_of(model)
    subject = _Subject(model, layers, optimizers, traced or TraceFindings(), tables_kept_as_rows, written)
    return tuple(Difference(sentence, anchor) for anchor, find in KINDS for sentence in find(subject))


def _normalising(subject: _Subject) -> Iterator[str]:
    norms = [each for each in subject.layers if isinstance(each, keras.layers.BatchNormalization) and each.trainable]
    if norms:
        yield f"{named(norms)} normalises each micro-batch by its own mean and variance, not the full batch's."


def _drawing(subject: _Subject) -> Iterator[str]:
    """Yield sentences on random draws, found in the trace if there is one, else in the layers' generators."""
    draws = subject.traced.draws or ()
    is_traced = subject.traced.draws is not None and not subject.model.run_eagerly
    holding = [] if is_traced else [layer for layer in subject.layers if _holds_generator(layer)]
    # For an eager model these are named before its first micro-batch, which shows the others.
    yield from _said_of_draws(DrawKind.NEW, [_pair(layer) for layer in holding if _keras_rates(layer)])
    yield from _said_of_draws(DrawKind.UNKNOWN, [_pair(layer) for layer in holding if not _keras_rates(layer)])
    said = {_pair(layer) for layer in holding}
    for kind in DrawKind:
        of_kind = [draw.layer for draw in draws if draw.kind is kind]
        own = _step_of(subject.model) if None in of_kind else ""
        yield from _said_of_draws(kind, [pair for pair in of_kind if pair and pair not in said], own)


def _said_of_draws(kind: DrawKind, layers: list[tuple[str, str]], own: str = "") -> Iterator[str]:
    """Yield a sentence on layers (pairs of class and name) and the step's ``own`` code, whose draws are of ``kind``."""
    who = listed([part for part in (named_pairs(layers), own) if part])
    is_one = len({class_name for class_name, _ in layers}) + bool(own) == 1
    if not who:
        return
    if kind is DrawKind.REPEATED:
        yield f"The seed of {who} does not change: each micro-batch gets the same random numbers."
        return
    verb = "may draw" if kind is DrawKind.UNKNOWN else "draws" if is_one else "draw"
    yield f"{who if layers else who[0].upper() + who[1:]} {verb} new random numbers in each micro-batch."


def _changed_gradients(subject: _Subject) -> Iterator[str]:
    if subject.traced.changed_for:
        names = listed([the_optimizer(subject.model, optimizer) for optimizer in subject.traced.changed_for])
        gets = "gets" if len(subject.traced.changed_for) == 1 else "get"
        yield (
            f"The gradients are changed before {names} {gets} them, by clipping say: that acts on those of each "
            "micro-batch. What the optimizer does itself (clipnorm, global_clipnorm, clipvalue) acts on the update's."
        )


def _spectral(subject: _Subject) -> Iterator[str]:
    spectral = [layer for layer in subject.layers if isinstance(layer, keras.layers.SpectralNormalization)]
    once = {id(variable) for variable in components(subject.traced.once_an_update)}
    own = {id(variable) for layer in spectral for variable in components(layer.variables)} - once
    if any(id(variable) in own for variable in subject.written):
        yield f"{named(spectral)} changes its kernel once for each micro-batch, not once for each update."


def _changed_by_the_step(subject: _Subject) -> Iterator[str]:
    """Yield a sentence on the variables that the user's own code changes in each micro-step."""
    apart = _told_apart(subject)
    settled = {id(handle) for handle in subject.traced.settled}
    changed = [
        variable
        for variable in subject.written
        if id(variable) not in apart
        and id(variable.handle) not in settled
        and not _is_seed(variable)
        and not _is_of_a_metric(variable)
    ]
    if changed:
        remaining = {id(variable): variable.name.partition(":")[0] for variable in changed}
        own = [
            variable.path
            for variable in subject.model.variables
            for part in components([variable])
            if remaining.pop(id(part), "")
        ]
        names = list(dict.fromkeys([*own, *remaining.values()]))
        yield f"train_step changes {_some_of(names)} itself: once for each micro-batch, not once for each update."


def _averaged_apart(subject: _Subject) -> Iterator[str]:
    if subject.traced.averaged_apart:
        yield (
            f"The statistics that {_some_of(subject.traced.averaged_apart)} follows are those of each micro-batch "
            "where train_step computes with them."
        )


def _repeated_rows(subject: _Subject) -> Iterator[str]:
    """Yield a sentence on embeddings whose repeated rows are summed before an optimizer that is not linear."""
    as_rows = {id(table) for table in subject.tables_kept_as_rows}
    repeated = subject.traced.repeated_rows
    repeating = None if repeated is None else {id(table) for table in repeated}
    embeddings = [
        layer
        for layer in subject.layers
        if isinstance(layer, keras.layers.Embedding)
        and layer.trainable
        and any(
            id(table) not in as_rows
            and (repeating is None or any(id(part) in repeating for part in components([table])))
            for table in distinct(layer.trainable_weights)
        )
    ]
    summed = [(each, verb) for each in subject.optimizers if (verb := _done_to_each_row(_innermost(each)))]
    if embeddings and summed:
        optimizer, verb = summed[0]
        yield (
            f"The gradients of a row of {named(embeddings)} that occurs several times are summed before "
            f"{the_optimizer(subject.model, optimizer)} {verb} them; Keras's TensorFlow backend {verb} each by itself."
        )


def _comparing(subject: _Subject) -> Iterator[str]:
    comparing = [name for loss in _losses_of(subject.model) if (name := _name_of(loss)) in _COMPARING]
    if comparing:
        yield (
            f"The loss {', '.join(dict.fromkeys(comparing))} compares samples with each other; it sees those of one "
            "micro-batch at a time."
        )
    elif (layer := _layer_of(subject, subject.traced.comparing)) is not None:
        yield f"In {named([layer])} a sample depends on the others of its batch: it sees those of its micro-batch."
    elif subject.traced.comparing:
        yield (
            f"The loss compares samples with each other, in {subject.traced.comparing}; it sees those of one "
            "micro-batch at a time."
        )


def _mixing(subject: _Subject) -> Iterator[str]:
    """Yield a sentence on what makes a sample depend on others of its batch; leave out batch normalisation."""
    layers: dict[int, Any] = {}
    elsewhere: list[str] = []
    for name in sorted(subject.traced.mixed):
        layer = _layer_of(subject, name)
        if layer is None:
            elsewhere.append(name)
        elif not isinstance(layer, keras.layers.BatchNormalization):
            layers[id(layer)] = layer
    if layers or elsewhere:
        where = named(list(layers.values())) if layers else elsewhere[0]
        yield f"In {where} a sample depends on the others of its batch: it sees those of its micro-batch."


def _layer_of(subject: _Subject, operation: str) -> Any:
    """Return the innermost layer whose scope contains the named operation; None if there is none."""
    by_name = {layer.name: layer for layer in subject.layers[1:]}
    scopes = [each for scope in reversed(operation.split("/")[:-1]) for each in (scope, _without_number(scope))]
    return next((by_name[scope] for scope in scopes if scope in by_name), None)


def _without_number(scope: str) -> str:
    """Return a layer's name without the number that TensorFlow appends when the layer is called again."""
    return re.sub(r"_\d+$", "", scope)


def _not_followed(subject: _Subject) -> Iterator[str]:
    """Yield a sentence if it is not known how a loss is made of the samples."""
    traced = subject.traced
    own = _own_loss_code(subject.model)
    because = f" (in {traced.untold})" if traced.untold else ""
    if traced.is_told or not (own or traced.adding_layers or traced.untold):
        return
    if own:
        made = f"{own}: how its loss is made of the samples is not known{because}"
    elif traced.adding_layers:
        made = f"How what {named(traced.adding_layers)} adds by add_loss is made of the samples is not known{because}"
    else:
        made = f"How the loss is made of the samples is not known{because}"
    yield f"{made}. It is taken for a mean over the samples of a batch, and a sum is weighed as one."


def _scalar_metrics(subject: _Subject) -> Iterator[str]:
    if subject.traced.scalar_metrics:
        yield (
            f"The metric {', '.join(subject.traced.scalar_metrics)} makes one number of a batch; it is averaged over "
            "the micro-batches by their samples, which is the full batch's only where it is a mean over samples."
        )


def _updated_in_parts(subject: _Subject) -> Iterator[str]:
    yield from whole_batch.sentences(subject.traced.updated_in_parts)


def _loose_logs(subject: _Subject) -> Iterator[str]:
    # A loss that is not understood gets its own sentence.
    if subject.traced.loose_logs and not subject.traced.untold and not subject.traced.comparing:
        names = ", ".join(repr(name) for name in subject.traced.loose_logs if name)
        named_as = f" as {names}" if names else ""
        yield f"What train_step returns{named_as} may not be the full batch's: each micro-batch makes its own."


KINDS = (
    ("batch-statistics", _normalising),
    ("random-draws", _drawing),
    ("changed-gradients", _changed_gradients),
    ("assignments", _spectral),
    ("assignments", _changed_by_the_step),
    ("assignments", _averaged_apart),
    ("repeated-rows", _repeated_rows),
    ("losses", _comparing),
    ("batch-statistics", _mixing),
    ("losses", _not_followed),
    ("metrics", _scalar_metrics),
    ("metrics", _updated_in_parts),
    ("metrics", _loose_logs),
)
"""Kinds of differences: the anchor that explains each, and the function that finds it."""


def _holds_generator(layer: Layer) -> bool:
    """Return True if a layer has a generator of random numbers, unless it is Keras's and its rates are all zero."""
    generators = [part for part in vars(layer).values() if isinstance(part, keras.random.SeedGenerator)]
    rates = _keras_rates(layer)
    return bool(generators) and (not rates or any(rate > 0 for rate in rates))


def _keras_rates(layer: Layer) -> list[float]:
    """Return the drawing rates of one of Keras's own layers; an empty list if its class has none."""
    library_class = next(cls for cls in type(layer).__mro__ if cls.__module__.partition(".")[0] == "keras")
    if library_class in (keras.layers.Layer, keras.Model):
        return []
    found = [getattr(layer, name, None) for name in _RATES]
    return [rate for rate in found if isinstance(rate, (int, float))]


def _pair(layer: Layer) -> tuple[str, str]:
    return type(layer).__name__, layer.name


def _step_of(model: Model) -> str:
    """Return a name for the user's code that runs outside of every layer."""
    own = _own_loss_code(model)
    return own[:1].lower() + own[1:] if own.startswith("The ") else own or "the loss"


def _done_to_each_row(optimizer: Optimizer) -> str:
    """Return the verb for what an optimizer does to gradients that is not linear; "" if all of it is linear."""
    if type(optimizer).__name__ not in _LINEAR:
        return "squares"
    clipping = [getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue")]
    return "clips" if any(clipping) else ""


def _own_loss_code(model: Model) -> str:
    """Return a name for the user's code that computes the loss; "" if Keras's own code does."""
    if not isinstance(model, keras.Model):
        return "The train_step of this loop"
    for name in ("train_step", "compute_loss"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            return f"{type(model).__name__}.{name}"
    return ""


def has_code_of_its_own(model: Model) -> bool:
    """Return True if the user's own step, loss or layer may reduce a batch on the way to the loss."""
    if _own_loss_code(model):
        return True
    losses = [loss for loss in tf.nest.flatten(getattr(model, "loss", None)) if not isinstance(loss, (str, type(None)))]
    own = [loss for loss in losses if not _is_keras(loss if hasattr(loss, "__name__") else type(loss))]
    return bool(own) or any(not _is_keras(type(layer)) for layer in models.layers_of(model)[1:])


def _is_keras(what: Any) -> bool:
    return str(getattr(what, "__module__", "")).partition(".")[0] == "keras"


def _told_apart(subject: _Subject) -> set[int]:
    """Return the ids of variables that have their own sentence or need none: metrics', optimizers', statistics."""
    # A plain step may write variables that micro-steps leave to the update.
    known = [*subject.traced.once_an_update]
    known += [variable for metric in subject.model.metrics for variable in metric.variables]
    known += [variable for optimizer in subject.optimizers for variable in optimizer.variables]
    for layer in subject.layers:
        if isinstance(layer, keras.layers.BatchNormalization) and not subject.traced.applied:
            known += layer.non_trainable_variables
        if isinstance(layer, keras.layers.SpectralNormalization):
            known += layer.variables
    return {id(variable) for variable in components(known)}


def _some_of(names: Sequence[str]) -> str:
    more = len(names) - _MOST_VARIABLES
    return f"{', '.join(names[:_MOST_VARIABLES])}{f' and {more} more' if more > 0 else ''}"


def _is_seed(variable: Variable) -> bool:
    """Return True for the state of a ``keras.random.SeedGenerator`` and of a ``tf.random.Generator``."""
    return "seed_generator_state" in str(variable.name) or str(variable.name).startswith("StateVar")


def _is_of_a_metric(variable: Variable) -> bool:
    """Return True if a variable belongs to a metric unknown to the model: Keras gives those the aggregation SUM."""
    return bool(variable.aggregation == tf.VariableAggregation.SUM)


def _losses_of(model: Model) -> list[Any]:
    """Return the losses given to ``compile``, and those among the model's attributes, which its own step may use."""
    found = []
    for attribute in vars(model).values():
        parts = attribute if isinstance(attribute, (list, tuple)) else [attribute]
        parts = list(attribute.values()) if isinstance(attribute, dict) else parts
        found += [part for part in parts if isinstance(part, keras.losses.Loss)]
    return [*tf.nest.flatten(getattr(model, "loss", None)), *found]


def _name_of(loss: Any) -> str:
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return str(name).lower()


def _innermost(optimizer: Optimizer) -> Any:
    return getattr(optimizer, "inner_optimizer", optimizer)
