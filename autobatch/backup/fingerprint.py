"""Marks by which a backup of another model, of other data or of another target is told, by name.

Names that Keras numbers (``dense_1``) may differ between two processes. So numbers in them do not count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.data import arrays
from autobatch.seams import data_adapters, models
from autobatch.seams.versions import leaves_with_paths
from autobatch.types import Model

_LOOKED_AT = 16
"""Samples of arrays that are looked at, evenly spread from the first to the last."""

_NUMBER = re.compile(r"_\d+(?=[_/]|$)")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_NAMES = ("name", "registered_name", "build_config", "input_layers", "output_layers", "inbound_nodes", "module")
"""Parts of a layer's configuration that hold names, or what its weights show."""

_SEEDS = ("seed",)
"""Parts, of parts too, that a process may choose by chance. A seed's state is a variable, which a backup holds."""


def of_data(x: Any, y: Any, options: dict[str, Any]) -> dict[str, str]:
    """Return what is told of the data of a training: kind, size, some samples, and the options that order them."""
    parts = {"x": x, "y": y, "sample_weight": options.get("sample_weight")}
    if data_adapters.are_arrays(x, y, options.get("sample_weight")):
        found = _of_arrays(parts)
    elif isinstance(x, tf.data.Dataset):
        elements = int(x.cardinality())
        found = {"x": f"tf.data.Dataset of {x.element_spec}, {elements if elements >= 0 else 'any number of'} elements"}
    else:
        found = {"x": f"{type(x).__name__} of {_length(x)} batches"}
    for name in ("class_weight", "shuffle", "steps_per_epoch", "validation_split"):
        if options.get(name) is not None:
            found[name] = repr(options[name])
    return found


def _length(x: Any) -> str:
    try:
        return str(len(x))
    except TypeError:
        return "any number of"


def _of_arrays(parts: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, part in parts.items():
        for path, leaf in leaves_with_paths(part):
            if leaf is not None:
                place = name + "".join(f"[{key!r}]" for key in path)
                shape = tuple(int(size) if size is not None else None for size in leaf.shape)
                kind = getattr(getattr(leaf, "dtype", None), "name", "values")
                found[place] = f"{kind} of shape {shape}, samples {_digest_of_samples(leaf)}"
    return found


def _digest_of_samples(leaf: Any) -> str:
    samples = int(leaf.shape[0]) if len(leaf.shape) else 0
    rows = np.unique(np.linspace(0, max(samples - 1, 0), _LOOKED_AT).astype(np.int64))
    taken = arrays.take_rows(leaf, rows) if samples else leaf
    return hashlib.sha256(_as_bytes(taken)).hexdigest()[:16]


def _as_bytes(leaf: Any) -> bytes:
    if hasattr(leaf, "toarray"):
        leaf = leaf.toarray()
    elif isinstance(leaf, tf.SparseTensor):
        leaf = tf.sparse.to_dense(leaf)
    elif isinstance(leaf, tf.RaggedTensor):
        return repr(leaf.to_list()).encode()
    array = np.asarray(leaf)
    return repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).tobytes()


def of_model(model: Model) -> dict[str, str]:
    """Return what is told of a model that is built: each weight, each layer, and the kind of its optimizer."""
    found = {"optimizer": type(model.optimizer).__name__}
    for variable, name in numbered((variable, variable.path) for variable in model.variables):
        found[f"weight {name}"] = f"{keras.backend.standardize_dtype(variable.dtype)} of shape {tuple(variable.shape)}"
    for layer, name in numbered((layer, layer.name) for layer in models.layers_of(model)):
        found[f"layer {name}"] = f"{type(layer).__name__}{_configuration(layer)}"
    return found


def numbered(named: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Return things with their names, without Keras's numbers, and with numbers of their own where names repeat."""
    seen: dict[str, int] = {}
    result = []
    for thing, name in named:
        plain = _NUMBER.sub("", name)
        seen[plain] = seen.get(plain, 0) + 1
        result.append((thing, plain if seen[plain] == 1 else f"{plain} ({seen[plain]})"))
    return result


def _configuration(layer: Any) -> str:
    try:
        config = layer.get_config()
    except Exception:  # noqa: BLE001 - a layer of the user's need not have one
        return ""
    told = _lasting({key: value for key, value in config.items() if key not in _NAMES})
    text = json.dumps(told, sort_keys=True, default=_as_text)
    if len(text) > 300 or "__lambda__" in text or "layers" in config:
        return ""  # nested layers are listed themselves; code of a lambda holds its place in the file
    return " " + _ADDRESS.sub("", text)


def _lasting(config: Any) -> Any:
    """Return the parts of a configuration that are the same in every process: without seeds and Keras's numbers."""
    if isinstance(config, dict):
        return {
            str(key): _NUMBER.sub("", value) if key == "name" and isinstance(value, str) else _lasting(value)
            for key, value in config.items()
            if key not in _SEEDS
        }
    if isinstance(config, (list, tuple)):
        return [_lasting(value) for value in config]
    return config


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def difference(kept: dict[str, str], found: dict[str, str]) -> str:
    """Return the first difference, as "weight dense/kernel was ... and is ..."; an empty string if there is none."""
    for name in (*kept, *found):
        before, now = kept.get(name), found.get(name)
        if before != now:
            return f"{name} was {before or 'not there'} then, and is {now or 'not there'} now"
    return ""
