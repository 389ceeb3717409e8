"""Private parts of Keras that rematerialisation needs."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from autobatch.seams.models import layers_of


def remat_mode_of(layer: Any) -> list[str] | None:
    """Return mode, threshold and layer names of the ``keras.RematScope`` that a layer was made in; None without one."""
    mode = getattr(layer, "_remat_mode", None)
    return None if mode is None else [str(mode.mode), str(mode.output_size_threshold), str(mode.layer_names)]


def rematerialisable_layers(model: Any) -> list[Any]:
    """Return the outermost layers made under a ``keras.RematScope`` that TensorFlow can recompute in a compiled step.

    ``tf.recompute_grad`` takes no keyword arguments there, and Keras passes ``training`` and ``mask`` as such. A layer
    whose ``call`` has either is not returned; its own layers are looked at instead. The model itself is treated alike.
    """
    found: list[Any] = []
    pending = list(model._flatten_layers(recursive=False, include_self=False))
    while pending:
        layer = pending.pop(0)
        keywords = {"training", "mask"} & set(inspect.signature(layer.call).parameters)
        # The output of an embedding or an input is no intermediate of its own.
        if isinstance(layer, (keras.layers.InputLayer, keras.layers.Embedding)):
            continue
        if keywords or isinstance(layer, keras.Model):
            pending += layer._flatten_layers(recursive=False, include_self=False)
        elif getattr(layer, "_remat_mode", None) is not None:
            found.append(layer)
    return found


def activated_layers(model: Any) -> list[Any]:
    """Return the layers made under a ``keras.RematScope`` that have an activation to recompute."""
    return [
        layer
        for layer in layers_of(model)
        if getattr(layer, "_remat_mode", None) is not None
        and getattr(layer, "activation", None) not in (None, keras.activations.linear)
    ]
