"""Preparation of the data that ``Model.fit`` was given: effective batches and validation data."""

from __future__ import annotations

import types
from typing import Any

import keras
import tensorflow as tf

from autobatch.data import arrays, cardinality
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.seams import data_adapters
from autobatch.step import supported
from autobatch.types import Batch, Dataset, Model

AS_THEY_COME = "as_they_come"
"""Option beside those of ``Model.fit``: True if the data's batches are effective batches, not to be cut again."""

_DATA_OPTIONS = ("sample_weight", "class_weight", "shuffle", AS_THEY_COME)


def prepare_data(
    model: Model,
    dataset: Dataset,
    y: Any,
    *,
    target_batch: int,
    options: dict[str, Any],
    only_look: bool = False,
    rounds: bool = False,
    keeps_order: bool = False,
) -> tuple[EffectiveBatches, dict[str, Any]]:
    """Turn ``fit``'s data, and those of its options that concern data, into effective batches.

    Return them with the options that are left for Keras's ``fit``. ``only_look`` is True if nothing will be trained on
    them, ``rounds`` if the user has given no ``target_batch``, ``keeps_order`` if another process may go on with them.
    """
    supported.require_supported(model)
    remaining = dict(options)
    data = {name: remaining.pop(name) for name in _DATA_OPTIONS if name in remaining}
    x, y, sample_weight = data_parts(dataset, y, data.pop("sample_weight", None))
    arrays.require_usable(x, y, sample_weight)
    split = remaining.pop("validation_split", 0.0)
    if split and remaining.get("validation_data") is None:
        parts, remaining["validation_data"] = arrays.split_arrays_for_validation(x, y, sample_weight, split)
        x, y, sample_weight = parts
    input_shapes = _input_shapes(model)
    validation_data = remaining.get("validation_data")
    if validation_data is not None:
        remaining["validation_data"] = _validation_data(
            validation_data, remaining.get("validation_batch_size"), target_batch, input_shapes
        )
    batches = EffectiveBatches(
        x,
        y,
        sample_weight,
        target_batch=target_batch,
        steps_per_epoch=remaining.get("steps_per_epoch"),
        input_shapes=input_shapes,
        validation_data=validation_data,
        only_look=only_look,
        rounds=rounds,
        keeps_order=keeps_order,
        **data,
    )
    return batches, remaining


def require_repeatable(dataset: Dataset) -> None:
    """Refuse data that can be read only once, for calls that look at data without training on them."""
    if isinstance(dataset, types.GeneratorType):
        raise ValueError(
            "A generator can be read only once, and tune would use up its first batches. Pass arrays, a "
            "tf.data.Dataset or a keras.utils.PyDataset; or call autobatch.fit, which trains on what it has looked "
            f"at. Received: {dataset!r}"
        )


def data_parts(dataset: Dataset, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Accept ``(x, y)`` and ``(x, y, sample_weight)`` as one argument, as ``validation_data`` does in Keras."""
    if isinstance(dataset, tuple) and y is None and 1 <= len(dataset) <= 3:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(dataset)
        if weight is not None and sample_weight is not None:
            raise ValueError(
                "sample_weight is given twice: as the third part of dataset and as an argument. Give it once. "
                f"Received: sample_weight={sample_weight!r}"
            )
        return x, y, sample_weight if weight is None else weight
    return dataset, y, sample_weight


def _input_shapes(model: Model) -> list[tuple[str, Any]]:
    """Return name and shape of each of the model's inputs, as far as they are known before it has seen data."""
    inputs = getattr(model, "inputs", None)
    if inputs:
        return [(tensor.name, tuple(tensor.shape)) for tensor in inputs]
    if not getattr(model, "built", False):
        return []
    config = model.get_build_config() or {}
    shape = config.get("input_shape")
    single = isinstance(shape, (tuple, list)) and all(size is None or isinstance(size, int) for size in shape)
    return [("", tuple(shape))] if single and shape else []


def _validation_data(data: Batch, batch_size: int | None, target_batch: int, input_shapes: Any) -> Any:
    """Return validation data for Keras: single samples of a dataset in batches, mapped files read as needed."""
    if isinstance(data, tf.data.Dataset):
        is_of_samples = cardinality.is_of_samples(data, input_shapes)
        return data.batch(batch_size or target_batch) if is_of_samples else data
    if isinstance(data, (tuple, list)) and len(data) <= 3 and data_adapters.are_arrays(*data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        arrays.require_usable(x, y, sample_weight)
        if arrays.any_read_by_rows(x, y):
            return arrays.MappedArrays(x, y, sample_weight, batch_size=batch_size, shuffle=False)
    return data
