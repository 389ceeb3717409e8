"""Differences between the versions of Keras and TensorFlow that are admitted: each has one function here.

The function is named for the difference. A comment in it names the version that the difference ends at. Once that is
the oldest version admitted (``OLDEST_KERAS`` and ``OLDEST_TENSORFLOW`` in :mod:`autobatch.arguments`), the function can
go. A version newer than all of these is taken to be like the newest.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import variables as _variables
from keras.src.backend.tensorflow import trainer as _trainer
from keras.src.trainers import data_adapters as _data_adapters
from keras.src.trainers import epoch_iterator as _epoch_iterator
from keras.src.trainers.data_adapters.data_adapter import DataAdapter as _DataAdapter

from autobatch.seams.patching import replaced

_KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])


def leaves_with_paths(nest: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the leaves of a nested structure, None included, behind their paths: the keys and positions on the way."""
    # Ends with Keras 3.7: keras.tree.flatten_with_path is new there.
    newer = getattr(keras.tree, "flatten_with_path", None)
    found = newer(nest) if newer is not None else _walked(nest, ())
    return [(tuple(path), leaf) for path, leaf in found]


def _walked(nest: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not keras.tree.is_nested(nest):
        yield path, nest
    elif isinstance(nest, Mapping):
        for key in nest if isinstance(nest, OrderedDict) else sorted(nest):
            yield from _walked(nest[key], (*path, key))
    else:
        for position, part in enumerate(nest):
            yield from _walked(part, (*path, position))


def common_variable_class() -> Any:
    """Return the class that Keras's variables of every backend inherit from, which defines ``value``."""
    # Ends with Keras 3.7: the class was named KerasVariable before.
    return getattr(_variables, "Variable", None) or _variables.KerasVariable


# -- Keras's fit ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def adapters_admitted() -> Iterator[None]:
    """Let Keras's ``fit`` take a data adapter in the place of data, while the context is open."""
    # Ends with Keras 3.7, which takes one as it is.
    if _KERAS >= (3, 7):
        yield
        return

    def admitting(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_data_adapter(x: Any, *args: Any, **named: Any) -> Any:
            return x if isinstance(x, _DataAdapter) else original(x, *args, **named)

        return get_data_adapter

    with replaced(_data_adapters, "get_data_adapter", admitting):
        yield


def place_of_steps() -> tuple[Any, str]:
    """Return the class and the name of the method that gives Keras's ``fit`` the steps of an epoch."""
    # Ends with Keras 3.7: TensorFlow's iterator had a method of its own before.
    if _KERAS < (3, 7):
        return _trainer.TFEpochIterator, "enumerate_epoch"
    return _epoch_iterator.EpochIterator, "_enumerate_iterator"


def steps_as_triples(epoch: Any, steps: Iterator[Any]) -> Iterator[tuple[int, int, Any]]:
    """Return the steps of an ``EpochIterator`` as triples of the first step, the last one and the iterator."""
    # Ends with Keras 3.11: a step was a pair of the first step and the iterator before.
    if _KERAS >= (3, 11):
        return steps
    counted = steps if _KERAS >= (3, 7) else _counted(epoch, steps)
    return ((begin, begin + epoch.steps_per_execution - 1, iterator) for begin, iterator in counted)


def _counted(epoch: Any, steps: Iterator[Any]) -> Iterator[Any]:
    # Ends with Keras 3.7: steps were counted only where the length of an epoch was not known before.
    goes_on = epoch.steps_per_epoch is not None and epoch._current_iterator is not None
    seen = epoch._steps_seen if goes_on else 0
    for step in steps:
        epoch._steps_seen = seen + epoch.steps_per_execution
        yield step
        seen = epoch._steps_seen  # earlier steps of the pass may have been added meanwhile


def steps_as_keras_takes_them(triples: Iterator[tuple[int, int, Any]]) -> Iterator[Any]:
    """Return steps as Keras's ``fit`` takes them, from triples."""
    # Ends with Keras 3.11, as above.
    return triples if _KERAS >= (3, 11) else ((begin, iterator) for begin, _, iterator in triples)


def holders_of_traces(function: Any) -> list[Any]:
    """Return what a train function of Keras's may hold its ``tf.function`` in: itself, and the cells of its closure."""
    # Ends with Keras 3.7: the train function was the tf.function itself before.
    return [function, *_contents(getattr(function, "__closure__", None) or ())]


def _contents(cells: Any) -> Iterator[Any]:
    for cell in cells:
        with contextlib.suppress(ValueError):  # it is empty yet
            yield cell.cell_contents


def settle_early_stopping(callback: Any) -> None:
    """Let an ``EarlyStopping`` choose its direction now, so that it keeps the best value that is given to it."""
    # Ends with Keras 3.7: it forgot the best value when it chose, at the end of its first epoch.
    if _KERAS < (3, 7) and isinstance(callback, keras.callbacks.EarlyStopping) and callback.monitor_op is None:
        with contextlib.suppress(ValueError):  # raised again by Keras, when the epoch ends
            callback._set_monitor_op()


# -- losses -----------------------------------------------------------------------------------------------------------


def divisor_of_valid(valid: Any, dtype: Any) -> Any:
    """Return the divisor of a mean of ``dtype`` over the ``valid`` elements that a mask lets pass: float64 scalars."""
    # Ends with Keras 3.13: keras.config.epsilon() was added before.
    if _KERAS >= (3, 13):
        return valid
    return tf.cast(tf.cast(valid, dtype) + tf.cast(keras.config.epsilon(), dtype), tf.float64)


# -- several devices --------------------------------------------------------------------------------------------------


def scalings_of_losses() -> tuple[str, ...]:
    """Return the names of the functions that divide losses by the number of replicas, and multiply them again."""
    # Ends with Keras 3.8: losses were not divided before.
    return ("scale_loss_for_distribution", "unscale_loss_for_distribution") if _KERAS >= (3, 8) else ()


def why_validation_begins_anew() -> str:
    """Return why the place in validation data cannot be kept here, with ``validation_steps``; "" if it can."""
    # Ends with Keras 3.7: it made its passes over data in another place before, see ValidationPasses.
    if _KERAS >= (3, 7):
        return ""
    return (
        "Shuffled validation data begin anew behind a restart, since Keras 3.6 does not show its passes over them: the "
        'training itself goes on as ever. To keep their place, run pip install "keras>=3.7". '
        f"Received: Keras {keras.__version__}"
    )


def why_not_on_several_devices() -> str:
    """Return why this Keras cannot train on several devices here; "" if it can."""
    # Ends with Keras 3.10. Until 3.9 each update of a metric joined all replicas, which no loop over micro-batches may
    # do. Until 3.7 losses were not divided by the number of replicas either.
    if _KERAS >= (3, 10):
        return ""
    return (
        "Training under a tf.distribute strategy needs Keras 3.10 or newer, since the metrics of older ones wait for "
        'all devices in every micro-batch: run pip install "keras>=3.10", or make the model outside of any '
        f"strategy's scope. Received: Keras {keras.__version__}"
    )
