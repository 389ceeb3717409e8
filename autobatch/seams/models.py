"""Private parts of Keras's models. Nothing outside of this room touches what is private in Keras or TensorFlow.

Seen with Keras 3.6 to 3.15 on TensorFlow 2.16 to 2.21. ``tests/seams/test_keras.py`` fails loudly when one of
them moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer as _TensorFlowTrainer
from keras.src.models.functional import Functional as _Functional
from keras.src.trainers.trainer import Trainer as _Trainer

from autobatch.seams.functions import converted
from autobatch.seams.gradients import registered_while_alive
from autobatch.seams.patching import replaced, suspended
from autobatch.seams.versions import holders_of_traces


def untraced(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the Python function behind a ``tf.function``, to be traced anew; return any other function as it is.

    A ``tf.function`` keeps its first trace, with the ``apply`` of that time and with what it captured.
    """
    function = getattr(step, "python_function", None)
    if function is None:
        return step

    return converted(function)


def discarding_assignments(model: Any) -> Any:
    """Return a context that discards assignments to Keras variables, so that a forward pass has no effect.

    The context holds the values of the model's variables, since weight regularizers read them there. It collects what
    layers add to the loss, as happens outside of it.
    """
    values = [(variable, variable.value) for variable in model.variables]
    return _backend.StatelessScope(values, collect_losses=True)


def global_seed_variables() -> list[Any]:
    """Return the state of the seed generator that layers without a seed share; an empty list before it exists."""
    generator = _global_state.get_global_attribute("global_seed_generator")
    return [] if generator is None else [generator.state]


def build_on(model: Any, element_spec: Any) -> None:
    """Create those variables of a compiled model that can be created before its first step is traced.

    ``element_spec`` describes a batch and leaves its first dimension open: a model remembers the size that it was built
    on. Functional and sequential models are built whole, with metrics and optimizer. The first trace builds the rest,
    as in Keras's own ``fit``: a model with its own ``call`` or ``train_step`` need not run on symbolic inputs.
    """
    strategy = getattr(model, "_distribute_strategy", None)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        _build_on(model, element_spec)


def _build_on(model: Any, element_spec: Any) -> None:
    if isinstance(model, (keras.Sequential, _Functional)):
        stack = list(model._layers)
        with contextlib.suppress(*_NOT_SYMBOLIC), registered_while_alive(model):
            model._symbolic_build(data_batch=_symbolic_batch(element_spec))
        if isinstance(model, keras.Sequential) and model._functional is None:
            model._layers = stack  # without the input that Keras has put before it, whose shape is taken for the user's
    if model.built and model.optimizer is not None and not model.optimizer.built and model.trainable_variables:
        model.optimizer.build(model.trainable_variables)


_NOT_SYMBOLIC = (RuntimeError, ValueError, TypeError, AttributeError)
"""Errors that a model may raise on symbolic inputs. The trace raises a real fault again, from the user's own code."""


def _symbolic_batch(element_spec: Any) -> tuple[Any, Any, Any]:
    symbolic = tf.nest.map_structure(
        lambda spec: None if spec is None else keras.KerasTensor(tuple(spec.shape), spec.dtype.name), element_spec
    )
    batch: tuple[Any, Any, Any] = keras.utils.unpack_x_y_sample_weight(symbolic)
    return batch


def is_built(model: Any) -> bool:
    """Return True if all layers of the model have their variables.

    A model that is only a holder of networks, without a ``call`` or ``build`` of its own, is never built itself.
    """
    own, *others = layers_of(model) or [model]
    is_holder = bool(others) and all(
        getattr(type(model), name, None) is getattr(keras.Model, name) for name in ("call", "build")
    )
    return (own.built or is_holder) and all(layer.built for layer in others)


def layers_of(model: Any) -> list[Any]:
    """Return a model, its layers, their layers, and so on; an empty list for anything that is no layer."""
    return list(model._flatten_layers()) if hasattr(model, "_flatten_layers") else []


def kept_with_compilation(model: Any, name: str, make: Callable[[], Any]) -> Any:
    """Return what is kept under a name until the model is compiled anew, made if it is not there yet.

    It is kept on a metric that Keras's ``compile`` makes. Return None for a model without one.
    """
    tracker = getattr(model, "_loss_tracker", None)
    if tracker is None:
        return None
    kept = vars(tracker)
    if name not in kept:
        kept[name] = make()  # past what Keras's objects do when an attribute is set
    return kept[name]


def is_traced(function: Any) -> bool:
    """Return True if a train function of Keras's holds a trace; False for None."""
    counts = (getattr(holder, "experimental_get_tracing_count", None) for holder in holders_of_traces(function))
    return any(count is not None and count() for count in counts)


def own_function(model: Any, kind: str) -> Callable[[Any], Any]:
    """Return Keras's own "train" or "test" function of a model whose function is replaced at the moment."""
    attribute = f"{kind}_function"
    instead = getattr(model, attribute)
    with suspended():
        getattr(model, f"make_{attribute}")(force=True)
    own: Callable[[Any], Any] = getattr(model, attribute)
    setattr(model, attribute, instead)
    return own


@contextlib.contextmanager
def making_replaced(model: Any, remade: Callable[[str], Callable[[Any], Any]]) -> Iterator[None]:
    """Let ``remade(kind)`` make the "train" or "test" function wherever Keras would make one anew, on this thread.

    That is in ``make_train_function`` and ``make_test_function``, if there is no function or with ``force``, and in
    ``compile``.
    """

    def maker_of(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        attribute = f"{kind}_function"

        def maker(original: Callable[..., Any]) -> Callable[..., Any]:
            def make(self: Any, force: bool = False) -> Any:
                if self is not model:
                    return original(self, force)
                if force or getattr(self, attribute) is None:
                    setattr(self, attribute, remade(kind))
                return getattr(self, attribute)

            return make

        return maker

    def compiler(original: Callable[..., Any]) -> Callable[..., Any]:
        def compile_again(self: Any, *args: Any, **kwargs: Any) -> Any:
            done = original(self, *args, **kwargs)
            if self is model:  # Keras's fit calls the function without asking whether it is there
                self.train_function, self.test_function = remade("train"), remade("test")
            return done

        return compile_again

    with (
        replaced(_TensorFlowTrainer, "make_train_function", maker_of("train")),
        replaced(_TensorFlowTrainer, "make_test_function", maker_of("test")),
        replaced(_Trainer, "compile", compiler),
    ):
        yield
