"""A live model in a worker: written aside as its configuration and a few samples, and built anew from there.

What is measured is memory and time, so neither the weights nor the rest of the data are needed. Layers that follow the
global dtype policy are written without one, so that they follow the worker's.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autobatch import display
from autobatch.errors import AutobatchError, NotApplicableError, UserCodeError
from autobatch.memory import arena, limits, nvml
from autobatch.records import Environment, Report, Variant
from autobatch.remedies import in_workers, measuring
from autobatch.trial.protocol import Trials
from autobatch.types import Batch, Model
from autobatch.units import format_bytes
from autobatch.worker import variants
from autobatch.worker.trials import WorkerTrials

MOST_SAMPLES = 32
"""Largest number of samples that are written; trials repeat them as needed."""

INSTEAD = "put what makes the model and its data into a function, and use: autobatch report file.py:function --remedies"

_ENDLESS = 1 << 16  # samples, where nobody says how many there are

_TARGET = """\
from autobatch.remedies import rebuilding

def build():
    return rebuilding.build({folder!r})
"""


def report_with_remedies(
    model: Model,
    batch_of: Callable[[int], Any],
    trials: Trials,
    search: Callable[[Trials], Report],
    *,
    target_batch: int | None,
    memory_limit_bytes: int | None,
    headroom: float,
) -> Report:
    """Return the report of a live model with its remedies, all made in workers, so that they compare; one at a time.

    Where the model cannot be built in a worker, the report is that of ``trials``, and every remedy says why.

    Args:
        model: Compiled; left as it is.
        batch_of: Makes a batch of the given number of samples, the largest that the data hold.
        trials: Those of the live model.
        search: Searches with the trials of the model, and of each remedy.
    """
    limit_bytes = memory_limit_bytes or arena.arena_limit_bytes(trials.environment.device)
    with tempfile.TemporaryDirectory(prefix="autobatch-") as folder:
        try:
            _require_room(trials.environment)
            settings = _write(Path(folder), model, batch_of, trials.largest_useful or target_batch or _ENDLESS)

            def open_worker(variant: Variant) -> WorkerTrials:
                return WorkerTrials(
                    f"{folder}/target.py:build",
                    target_batch=target_batch,
                    memory_limit=limit_bytes,
                    headroom=headroom,
                    precision=settings["policy"],
                    variant=variant,
                )

            base = in_workers.report_as_it_is(open_worker, search)
        except AutobatchError as error:
            text = str(error) if isinstance(error, NotApplicableError) else f"its worker failed: {error}"
            if isinstance(error, UserCodeError):
                text = f"the model cannot be rebuilt in a worker: {error}; {INSTEAD}"
            return measuring.without_remedies(search(trials), text)
        base = in_workers.with_own(base, model_name=trials.model_name, host_uses=trials.host_uses)
        try:
            return in_workers.with_remedies(
                base, open_worker, search, host_total_bytes=limits.host_total_bytes(), on_start=_name_search
            )
        finally:
            _name_search("")


def _name_search(heading: str) -> None:
    display.search_heading = heading


def build(folder: str) -> tuple[Any, Any]:
    """Build, in the worker, the compiled model that :func:`report_with_remedies` wrote, and data of its samples."""
    import keras
    import tensorflow as tf

    from autobatch.seams import fitting

    written = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    keras.config.set_floatx(written["floatx"])
    keras.config.set_image_data_format(written["image_data_format"])
    keras.config.enable_unsafe_deserialization()  # Lambda layers: it is the user's own model, written a moment ago
    sys.path += [place for place in written["path"] if place not in sys.path]
    try:
        # Keras itself imports no module to look for a class.
        own = {name: getattr(importlib.import_module(module), name) for module, name in written["own"]}
        with keras.saving.custom_object_scope(own):
            model = keras.saving.deserialize_keras_object(written["model"])
            model.compile(**keras.saving.deserialize_keras_object(written["compile"]))
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        raise NotApplicableError(_not_rebuilt(error)) from error
    model.jit_compile = written["jit_compile"]
    fitting.without_own_fit(model)  # the batch is what the model's own fit has made of the data
    # Written by the parent into a folder that only this user can enter.
    batch = pickle.loads((Path(folder) / "batch.pickle").read_bytes())
    rows = len(tf.nest.flatten(batch)[0])
    dataset = tf.data.Dataset.from_tensor_slices(batch).repeat().take(written["samples"]).batch(rows)
    return model, dataset


def _write(folder: Path, model: Model, batch_of: Callable[[int], Any], samples: int) -> dict[str, Any]:
    """Write model, batch and target into ``folder``; return what the worker must be started with.

    Raises:
        NotApplicableError: The model or its data cannot be written.
    """
    import keras

    policy = keras.config.dtype_policy().name
    try:
        described = keras.saving.serialize_keras_object(model)
        compiled = described.pop("compile_config", None)
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        compiled = {**compiled, "optimizer": keras.saving.serialize_keras_object(optimizer)} if compiled else None
        if compiled is None or described.get("config") is None:
            raise ValueError(f"{type(model).__name__} does not tell how it is made or compiled")
        own = [*_own_classes([described, compiled]), *_own_functions(model)]
        text = json.dumps(
            {
                "model": _without_policy(described, policy),
                "compile": compiled,
                "jit_compile": bool(model.jit_compile),
                "floatx": keras.config.floatx(),
                "image_data_format": keras.config.image_data_format(),
                "samples": samples,
                "own": own,
                "path": sys.path,
            }
        )
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise NotApplicableError(_not_rebuilt(error)) from error
    (folder / "model.json").write_text(text, encoding="utf-8")
    (folder / "batch.pickle").write_bytes(pickle.dumps(_on_host(batch_of(min(samples, MOST_SAMPLES)))))
    (folder / "target.py").write_text(_TARGET.format(folder=str(folder)), encoding="utf-8")
    return {"policy": policy}


def _own_classes(described: Any) -> list[tuple[str, str]]:
    """Return module and name of every class in ``described`` that is not Keras's.

    Raises:
        ValueError: One of them is of the script itself: Keras then gives no module.
    """
    found = []
    if isinstance(described, dict):
        if {"module", "class_name", "registered_name"} <= set(described):
            module, name = described["module"], described["class_name"]
            if module is None:
                raise ValueError(f"{name} is defined in the script itself, where a worker cannot import it")
            if module.partition(".")[0] not in ("keras", "builtins"):
                found.append((module, name))
        described = list(described.values())
    if isinstance(described, list):
        found += [each for item in described for each in _own_classes(item)]
    return list(dict.fromkeys(found))


def _own_functions(model: Model) -> list[tuple[str, str]]:
    """Return module and name of the loss and of activations that are functions of the user's own.

    Keras writes the names of such functions alone.

    Raises:
        ValueError: One of them is defined where a worker cannot import it.
    """
    import keras

    functions = [
        *keras.tree.flatten(getattr(model, "loss", None)),
        *(getattr(layer, "activation", None) for layer in variants.layers_of_variant(model)),
    ]
    found = []
    for function in functions:
        if isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] != "keras":
            if function.__module__ == "__main__" or "<" in function.__qualname__:
                raise ValueError(f"{function.__qualname__} is defined where a worker cannot import it")
            found.append((function.__module__, function.__name__))
    return list(dict.fromkeys(found))


def _without_policy(described: Any, policy: str) -> Any:
    """Return ``described`` less the dtype of every layer that has the policy that is global here."""
    if isinstance(described, list):
        return [_without_policy(item, policy) for item in described]
    if not isinstance(described, dict):
        return described
    return {name: _without_policy(value, policy) for name, value in described.items() if not _is(value, policy)}


def _is(value: Any, policy: str) -> bool:
    return (
        isinstance(value, dict)
        and value.get("class_name") == "DTypePolicy"
        and (value.get("config") or {}).get("name") == policy
    )


def _on_host(batch: Batch) -> Any:
    import tensorflow as tf

    for leaf in tf.nest.flatten(batch):
        if not tf.is_tensor(leaf) or leaf.dtype == tf.string or not isinstance(leaf, tf.Tensor):
            raise NotApplicableError(
                f"its data cannot be carried into a worker, for they hold {type(leaf).__name__}; {INSTEAD}"
            )
    return tf.nest.map_structure(lambda leaf: leaf.numpy(), batch)


def _require_room(environment: Environment) -> None:
    """Refuse a device if this process holds the memory of the GPU that a worker would need."""
    if not environment.device.startswith("GPU"):
        return
    device = environment.device
    card = nvml.devices().for_tensorflow(
        limits.physical_device(device), device_name=limits.tensorflow_device_name(device)
    )
    needed = environment.limit_bytes
    if card is not None and needed is not None and card.free_bytes >= needed + limits.CUDA_CONTEXT_BYTES:
        return
    free = "an unknown amount" if card is None else format_bytes(card.free_bytes)
    raise NotApplicableError(
        f"a worker needs the memory of {device}, of which this process leaves {free} free; {INSTEAD}"
    )


def _not_rebuilt(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause  # the errors that Keras raises over it say less
    told = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"the model cannot be rebuilt in a worker: {told}; {INSTEAD}"
