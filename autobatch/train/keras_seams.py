"""What is private in Keras is touched here, and in the other modules whose names end in ``_seams``; nowhere else.

Seen with Keras 3.14 and 3.15 on TensorFlow 2.20 and 2.21. ``tests/train/test_keras_seams.py`` fails loudly when one of
them moves.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.losses import loss as _loss_module
from keras.src.models.functional import Functional as _Functional
from keras.src.trainers import data_adapters as _data_adapters
from keras.src.trainers.compile_utils import CompileLoss as _CompileLoss
from keras.src.trainers.data_adapters import array_slicing as _array_slicing
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from autobatch.train import strategy_seams
from autobatch.train.function_seams import converted
from autobatch.train.optimizer_seams import ApplyHandler, apply_of, capture_apply, optimizers_of
from autobatch.train.patching import PATCHING as _PATCHING
from autobatch.train.patching import on_this_thread

__all__ = [
    "ApplyHandler",
    "DataAdapter",
    "activated_layers",
    "added_losses_noted",
    "apply_mask",
    "apply_of",
    "build_on",
    "capture_apply",
    "data_adapter_for",
    "discarding_assignments",
    "global_seed_variables",
    "gradients_weighed",
    "intercept_reductions",
    "is_array_adapter",
    "is_built",
    "layers_of",
    "optimizers_of",
    "own_function",
    "remat_mode_of",
    "rematerialisable_layers",
    "require_stateless",
    "require_supported",
    "split_validation",
    "squeeze_or_expand",
    "standardize_reduction",
    "untraced",
    "without_gradients",
]

ReductionHandler = Callable[..., Any]
"""Takes Keras's own ``reduce_weighted_values``, whether ``compile(loss=...)`` is calling, and its arguments."""

apply_mask = _loss_module.apply_mask
squeeze_or_expand = _loss_module.squeeze_or_expand_to_same_rank
standardize_reduction = _loss_module.standardize_reduction


def untraced(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The Python function that a ``tf.function`` was made of, to be traced anew; any other function as it is.

    A ``tf.function`` keeps its first trace: with the ``apply`` that was there then, and with what it captured.
    """
    function = getattr(step, "python_function", None)
    if function is None:
        return step

    return converted(function)


@contextlib.contextmanager
def intercept_reductions(handler: ReductionHandler) -> Iterator[None]:
    """While this lasts, every Keras loss reduces its values through ``handler``.

    Every ``keras.losses.Loss`` calls the module-level ``reduce_weighted_values``; ``handler`` gets that function, a
    flag that tells whether the loss is one of ``compile(loss=...)``, and the call's arguments.
    """
    calling: list[Any] = []

    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: Any = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        return handler(original_reduce, bool(calling), values, sample_weight, mask, reduction, dtype)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calling.append(self)
        try:
            return original_call(self, *args, **kwargs)
        finally:
            calling.pop()

    with _PATCHING:
        original_reduce = _loss_module.reduce_weighted_values
        original_call = _CompileLoss.call
        _loss_module.reduce_weighted_values = on_this_thread(original_reduce, reduce_weighted_values)
        _CompileLoss.call = on_this_thread(original_call, call)
        try:
            yield
        finally:
            _loss_module.reduce_weighted_values = original_reduce
            _CompileLoss.call = original_call


def discarding_assignments(model: Any) -> Any:
    """A context in which assignments to Keras variables go nowhere, so that a forward pass has no effect.

    The model's variables are given to it with their values: weight regularizers read them from there. What layers add
    to the loss is collected, as outside of it.
    """
    values = [(variable, variable.value) for variable in model.variables]
    return _backend.StatelessScope(values, collect_losses=True)


def global_seed_variables() -> list[Any]:
    """The state of the seed generator that layers without a seed of their own share, if it exists yet."""
    generator = _global_state.get_global_attribute("global_seed_generator")
    return [] if generator is None else [generator.state]


def build_on(model: Any, element_spec: Any) -> None:
    """Create what variables of a compiled model can be created before its first step is traced.

    ``element_spec`` describes a batch, its first dimension left open (a model built on another remembers that).
    Functional and sequential models are built whole, metrics and optimizer too; what is left the first trace builds, as
    in Keras's own ``fit``: a model with a ``call`` or a ``train_step`` of its own need not run on symbolic inputs.
    """
    strategy = getattr(model, "_distribute_strategy", None)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        _build_on(model, element_spec)


def _build_on(model: Any, element_spec: Any) -> None:
    if isinstance(model, (keras.Sequential, _Functional)):
        with contextlib.suppress(*_NOT_SYMBOLIC):
            model._symbolic_build(data_batch=_symbolic_batch(element_spec))
    if model.built and model.optimizer is not None and not model.optimizer.built and model.trainable_variables:
        model.optimizer.build(model.trainable_variables)


_NOT_SYMBOLIC = (RuntimeError, ValueError, TypeError, AttributeError)
"""What a model may raise on symbolic inputs. What is wrong with it, the trace raises from the user's own code."""


def _symbolic_batch(element_spec: Any) -> tuple[Any, Any, Any]:
    symbolic = tf.nest.map_structure(
        lambda spec: None if spec is None else keras.KerasTensor(tuple(spec.shape), spec.dtype.name), element_spec
    )
    batch: tuple[Any, Any, Any] = keras.utils.unpack_x_y_sample_weight(symbolic)
    return batch


@contextlib.contextmanager
def _gradient_replaced(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While this lasts, ``GradientTape.gradient`` is what ``make`` makes of it.

    Within a gradient it is what it was: what recomputes a part of a forward pass asks another tape for its own.
    """
    within: list[bool] = []

    def outermost(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        def gradient(*args: Any, **named: Any) -> Any:
            if within:
                return original(*args, **named)
            within.append(True)
            try:
                return replacement(*args, **named)
            finally:
                within.pop()

        return gradient

    with _PATCHING:
        original = tf.GradientTape.gradient
        tf.GradientTape.gradient = on_this_thread(original, outermost(original, make(original)))
        try:
            yield
        finally:
            tf.GradientTape.gradient = original


def gradients_weighed(
    weigh: Callable[..., Any], note: Callable[[Any, Any], None]
) -> contextlib.AbstractContextManager[None]:
    """While this lasts, ``GradientTape.gradient`` is ``weigh(original, tape, target, sources, ...)``.

    ``note`` is told every target and its gradients.
    """

    def weighed(original: Callable[..., Any]) -> Callable[..., Any]:
        def gradient(self: Any, target: Any, sources: Any, *rest: Any, **named: Any) -> Any:
            gradients = weigh(original, self, target, sources, *rest, **named)
            note(target, gradients)
            return gradients

        return gradient

    return _gradient_replaced(weighed)


@contextlib.contextmanager
def added_losses_noted(note: Callable[[Any, Any], None]) -> Iterator[None]:
    """While this lasts, ``note`` is told each layer that calls ``add_loss``, and what it adds.

    Keras's own call, for an activity regularizer, is none of the layer's.
    """
    with _PATCHING:
        original = keras.layers.Layer.add_loss

        def add_loss(self: Any, loss: Any) -> Any:
            caller = inspect.currentframe()
            caller = None if caller is None else caller.f_back
            caller = None if caller is None else caller.f_back  # past what tells the threads apart
            if caller is None or caller.f_code.co_filename != inspect.getfile(keras.layers.Layer):
                note(self, loss)
            return original(self, loss)

        keras.layers.Layer.add_loss = on_this_thread(original, add_loss)
        try:
            yield
        finally:
            keras.layers.Layer.add_loss = original


def without_gradients(weigh: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """While this lasts, ``GradientTape.gradient`` is zero for variables, so that a forward pass alone is traced.

    ``weigh`` is called as under :func:`gradients_weighed`, with what makes zeros as the original. The gradients of
    other tensors, which a loss may be made of, are what they are.
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


def is_built(model: Any) -> bool:
    """Whether all layers of the model have their variables."""
    return all(layer.built for layer in layers_of(model))


def layers_of(model: Any) -> list[Any]:
    """A model, its layers, theirs, and so on; empty for what is no layer."""
    return list(model._flatten_layers()) if hasattr(model, "_flatten_layers") else []


def remat_mode_of(layer: Any) -> list[str] | None:
    """The ``keras.RematScope`` that a layer was made in, in words; None if there was none."""
    mode = getattr(layer, "_remat_mode", None)
    return None if mode is None else [str(mode.mode), str(mode.output_size_threshold), str(mode.layer_names)]


def require_supported(model: Any) -> None:
    """Refuse models whose training goes another way than through Keras's own ``fit``.

    Raises:
        ValueError: the model was made under a distribution strategy that is not supported, or cannot be trained under
            the one that it was made under, or makes its own train function.
    """
    strategy_seams.require_supported(model)
    if getattr(type(model), "make_train_function", None) is not keras.Model.make_train_function:
        raise ValueError(
            "This model overrides make_train_function, which autobatch would pass by. Put what it does in train_step. "
            f"Received: {type(model).__name__}"
        )
    require_stateless(model)


def require_stateless(model: Any) -> None:
    """Refuse recurrent layers that hand a sample's state on to the one in the same place of the next batch.

    Raises:
        ValueError: names the layers.
    """
    stateful = [layer.name for layer in layers_of(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    if stateful:
        raise ValueError(
            "A recurrent layer with stateful=True hands each sample's state to the sample in the same place of the "
            "next batch; cut into micro-batches, it would go to another sample of the same batch. Set stateful=False, "
            f"or train this model by Model.fit. Received: {', '.join(stateful)}"
        )


def own_function(model: Any, kind: str) -> Callable[[Any], Any]:
    """Keras's own "train" or "test" function of a model whose function is replaced at the moment."""
    attribute = f"{kind}_function"
    replaced = getattr(model, attribute)
    getattr(model, f"make_{attribute}")(force=True)
    own: Callable[[Any], Any] = getattr(model, attribute)
    setattr(model, attribute, replaced)
    return own


def data_adapter_for(**arguments: Any) -> Any:
    """Keras's own adapter for the data that ``Model.fit`` accepts; the arguments are those of ``Model.fit``."""
    return _data_adapters.get_data_adapter(**arguments)


def is_array_adapter(adapter: Any) -> bool:
    """Whether the adapter slices arrays, so that it makes batches of any size itself."""
    return isinstance(adapter, _data_adapters.ArrayDataAdapter)


def split_validation(x: Any, y: Any, sample_weight: Any, validation_split: float) -> tuple[Any, Any]:
    """Split arrays as ``Model.fit(validation_split=...)`` does: ``((x, y, sample_weight), validation_data)``."""
    train, validation = _array_slicing.train_validation_split((x, y, sample_weight), validation_split=validation_split)
    return train, validation


def rematerialisable_layers(model: Any) -> list[Any]:
    """The outermost layers made under a ``keras.RematScope`` that TensorFlow can recompute in a compiled step.

    ``tf.recompute_grad`` takes no keyword arguments there, and Keras passes ``training`` and ``mask`` as such: layers
    whose ``call`` has either are looked into instead, and so is the model itself.
    """
    found: list[Any] = []
    pending = list(model._flatten_layers(recursive=False, include_self=False))
    while pending:
        layer = pending.pop(0)
        keywords = {"training", "mask"} & set(inspect.signature(layer.call).parameters)
        # What an embedding or an input puts out is no intermediate of its own.
        if isinstance(layer, (keras.layers.InputLayer, keras.layers.Embedding)):
            continue
        if keywords or isinstance(layer, keras.Model):
            pending += layer._flatten_layers(recursive=False, include_self=False)
        elif getattr(layer, "_remat_mode", None) is not None:
            found.append(layer)
    return found


def activated_layers(model: Any) -> list[Any]:
    """The layers made under a ``keras.RematScope`` that have an activation to recompute."""
    return [
        layer
        for layer in layers_of(model)
        if getattr(layer, "_remat_mode", None) is not None
        and getattr(layer, "activation", None) not in (None, keras.activations.linear)
    ]
