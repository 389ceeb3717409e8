"""Digest of what is trained: equal for two trainings that need the same memory and the same time.

A remembered result is found by it. It covers the optimizer, the loss, the data's shapes and dtypes, and what the model
is made of: classes, configurations, the shapes of its variables, the user's own code. It leaves out the names that
Keras counts up, and numbers that change no shape, such as a learning rate. An object without a configuration goes in by
its class and plain attributes. So two different models may share a digest: a remembered size is run once before it is
used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import types
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from autobatch.memory import arena, limits
from autobatch.seams import models, rematerialisation
from autobatch.seams.optimizers import optimizers_of
from autobatch.step.loop_model import LoopModel
from autobatch.types import Model, Optimizer

logger = logging.getLogger("autobatch")

_LIBRARIES = ("keras", "tensorflow", "autobatch", "builtins", "abc", "typing", "collections")
"""Packages whose classes are known by the packages' versions; the code of all other classes counts."""

_CHANGE_MEMORY = ("TF_ENABLE_ONEDNN_OPTS", "TF_GPU_ALLOCATOR", "TF_XLA_FLAGS", "XLA_FLAGS")
"""Environment variables that change the memory that a step needs."""

_SCALARS = (bool, int, float, str, bytes, type(None))
_DEEPEST = 30
_MOST_ITEMS = 1000


def content_digest(model: Model, sample: Iterable[object], surroundings: Mapping[str, object]) -> str:
    """Return the digest of a compiled model, of what its data hold, and of ``surroundings``: further plain values."""
    try:
        text = json.dumps(_content(model, sample, surroundings), sort_keys=True)
    except Exception as error:  # noqa: BLE001 - objects of the user's may do anything when they are looked at
        logger.debug("%s is known by its variables alone: %r", type(model).__name__, error)
        parts = (_class_name(type(model)), *_variables(model), *sample, *sorted(surroundings.items()))
        text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def surroundings_of(device: str, user_limit_bytes: int | None) -> dict[str, object]:
    """Return the device's name, the limits that somebody set, and what else here changes the needs of a step."""
    return {
        "device_name": limits.tensorflow_device_name(device) or platform.machine(),
        "user_limit_bytes": user_limit_bytes,
        "arena_limit_bytes": arena.arena_limit_bytes(device),
        **{name: os.environ.get(name) for name in _CHANGE_MEMORY},
    }


def _content(model: Model, sample: Iterable[object], surroundings: Mapping[str, object]) -> dict[str, object]:
    trained = model.model if isinstance(model, LoopModel) else model
    loss = getattr(model, "loss", None)
    return {
        "model": _describe(trained),
        "layers": [[_describe(layer), rematerialisation.remat_mode_of(layer)] for layer in models.layers_of(trained)],
        "variables": _variables(model),
        "train_step": _plain(model.train_step) if isinstance(model, LoopModel) else None,
        "loss": _plain(list(loss.values()) if isinstance(loss, dict) else loss),
        "run_eagerly": bool(model.run_eagerly),
        "optimizers": [_describe_optimizer(optimizer) for optimizer in optimizers_of(model)],
        "sample": _plain(list(sample)),
        "surroundings": _plain(dict(surroundings)),
    }


def _variables(model: Model) -> list[object]:
    return [[*variable.shape, str(variable.dtype), bool(variable.trainable)] for variable in model.variables]


def _describe(thing: Any) -> object:
    """Return class and configuration of a model, layer, loss or the like, and the user's own part of its code."""
    described = [_class_name(type(thing)), _without_counted_names(_plain(_config_of(thing)))]
    if isinstance(thing, keras.layers.Lambda):
        described.append(_plain(thing.function))
    own = [cls for cls in type(thing).__mro__ if cls.__module__.partition(".")[0] not in _LIBRARIES]
    if own:
        described.append([[_class_name(cls), _class_code(cls)] for cls in own])
        # Private ones are Keras's for the most part, and change in training.
        names = [name for name in vars(thing) if not name.startswith("_") and name not in _attributes_of_keras()]
        described.append({name: _plain(vars(thing)[name]) for name in names if _is_simple(vars(thing)[name])})
    return described


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    """Return the names that Keras itself keeps in the dictionaries of layers and models."""
    # With names given, they leave Keras's count for the names of the user's layers alone.
    plain = (keras.layers.Layer(name="plain"), keras.Model(name="plain"))
    return frozenset(["stop_training", *(name for thing in plain for name in vars(thing))])


def _config_of(thing: Any) -> object:
    try:
        return thing.get_config()
    except Exception as error:  # noqa: BLE001 - the user's own get_config may raise anything, and can be done without
        logger.debug("%s has no configuration to be known by: %r", type(thing).__name__, error)
        return None


def _describe_optimizer(optimizer: Optimizer) -> object:
    """Return the class of an optimizer, and the part of its configuration that makes slots.

    A rate or a factor counts only by whether it is zero.
    """
    config = _config_of(optimizer)
    kept: dict[str, object] = {}
    if isinstance(config, dict):
        for name, value in config.items():
            if name not in ("name", "learning_rate"):
                kept[name] = bool(value) if isinstance(value, float) else _plain(value)
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        kept["inner_optimizer"] = _describe_optimizer(inner)
        kept.pop("initial_scale", None)
    return [_class_name(type(optimizer)), kept]


def _is_simple(value: object, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        few = len(value) <= _MOST_ITEMS and depth < _DEEPEST  # not data, and not a list that holds itself
        return few and all(_is_simple(item, depth + 1) for item in value)
    return isinstance(value, (*_SCALARS, types.FunctionType))


def _plain(value: object, depth: int = 0) -> object:
    """Return ``value`` as JSON holds it, the same in every process: no addresses, no order of a set."""
    if depth > _DEEPEST:
        return "..."
    inside = functools.partial(_plain, depth=depth + 1)
    if isinstance(value, (bool, int, str, type(None))):
        return value
    if isinstance(value, (float, bytes, complex)):
        return repr(value)
    if isinstance(value, Mapping):
        if value.get("class_name") == "__lambda__":  # bytes that are not the same twice
            return "__lambda__"
        return {str(key): inside(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [inside(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(inside(item), sort_keys=True) for item in value)
    if isinstance(value, np.generic):
        return inside(value.item())
    if isinstance(value, types.CodeType):
        return [value.co_name, value.co_code.hex(), list(value.co_names), [inside(item) for item in value.co_consts]]
    if isinstance(value, type):
        return _class_name(value)
    if callable(getattr(value, "get_config", None)):
        return [_class_name(type(value)), inside(_config_of(value))]
    function = _function_of(value)
    if function is not None:
        cells = [_cell_contents(cell) for cell in function.__closure__ or ()]
        simple = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return [function.__qualname__, inside(function.__code__), [inside(item) for item in simple if _is_simple(item)]]
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return [_class_name(type(value)), *([] if shape is None else [str(shape), str(dtype)])]


def _function_of(value: Any) -> types.FunctionType | None:
    """Return the Python function behind a method, a ``tf.function`` or a ``functools.partial``; None without one."""
    for _ in range(_DEEPEST):
        if isinstance(value, types.FunctionType):
            return value
        inner = (getattr(value, name, None) for name in ("__func__", "python_function", "__wrapped__", "func", "fget"))
        value = next((each for each in inner if each is not None), None)
    return None


def _cell_contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None


def _class_code(cls: type) -> object:
    functions = {name: _function_of(value) for name, value in vars(cls).items()}
    return {name: _plain(function.__code__) for name, function in functions.items() if function is not None}


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _without_counted_names(config: object) -> object:
    """Return a configuration with each layer's name replaced by its place in the order of appearance.

    Keras goes on counting names for as long as a process lives. Other parts refer to a name from lists
    ("keras_history", "output_layers"). A string outside of lists, such as the activation "softmax", is no layer's name.
    """
    names: dict[str, str] = {}

    def collect(part: object) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("name"), str):
                names.setdefault(part["name"], f"#{len(names)}")
            for key in sorted(part):
                collect(part[key])
        elif isinstance(part, list):
            for item in part:
                collect(item)

    def renamed(part: object, is_reference: bool) -> object:
        if isinstance(part, dict):
            return {key: renamed(value, key == "name") for key, value in part.items()}
        if isinstance(part, list):
            return [renamed(item, True) for item in part]
        return names.get(part, part) if is_reference and isinstance(part, str) else part

    collect(config)
    return renamed(config, False)
