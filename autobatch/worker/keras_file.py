"""Sizing of a saved model, as ``model.keras``, on made-up data: sizing without a script."""

from __future__ import annotations

from typing import Any

from autobatch.errors import TargetError
from autobatch.types import Model

ENDINGS = (".keras", ".h5")

_INSTEAD = "Load it in a function of a Python file that returns (model, dataset), and use file.py:function."


def model_and_data(path: str, input_shape: tuple[int, ...] | None, count: int, notes: list[str]) -> tuple[Model, Any]:
    """Return the compiled model of a file, and a dataset of one made-up sample, ``count`` times.

    Args:
        path: The file, as ``model.save`` has written it.
        input_shape: Shape of the input without the batch, where the model leaves dimensions of it open.
        count: Samples in the dataset; they take no memory.
        notes: Gets what is assumed for want of a compile configuration.

    Raises:
        TargetError: The file cannot be loaded, or its model gives no shape to make data of.
    """
    import keras
    import tensorflow as tf

    model = _load(path, notes)
    inputs = _inputs(path, model, input_shape)
    zeros = keras.tree.map_structure(lambda spec: tf.zeros((1, *spec.shape), spec.dtype), inputs)
    try:
        outputs = model(zeros)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise TargetError(f"{path} does not take inputs of {_words(inputs)}: {_first_line(error)}") from error
    if not getattr(model, "compiled", False):
        model.compile(optimizer="adam", loss="mse")
        notes.append(f"{path} was saved without its compile configuration: sized with Adam and mean squared error.")
    targets = _targets(model, outputs)
    # A list would be taken for one tensor.
    sample = _without_lists((keras.tree.map_structure(lambda zero: zero[0], zeros), targets))
    return model, tf.data.Dataset.from_tensors(sample).repeat(count)


def _without_lists(structure: Any) -> Any:
    if isinstance(structure, dict):
        return {key: _without_lists(value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return tuple(_without_lists(value) for value in structure)
    return structure


def _load(path: str, notes: list[str]) -> Model:
    import keras

    failures = (ValueError, TypeError, KeyError, OSError, AttributeError, ImportError)
    try:
        return keras.saving.load_model(path)
    except failures as error:
        first = error
    try:
        model = keras.saving.load_model(path, compile=False)
    except failures:
        raise TargetError(f"{path} cannot be loaded: {_first_line(first)} {_INSTEAD}") from first
    model.compile(optimizer="adam", loss="mse")
    notes.append(
        f"The compile configuration of {path} cannot be loaded, so that it is sized with Adam and mean squared error: "
        f"{_first_line(first)} {_INSTEAD}"
    )
    return model


def _inputs(path: str, model: Model, given: tuple[int, ...] | None) -> Any:
    """Return shape and dtype of each input of a sample, in the structure that the model takes."""
    import keras
    import tensorflow as tf

    listed = getattr(model, "inputs", None)
    inputs = getattr(model, "input", None)
    if inputs is None and listed:  # a Sequential has no other
        inputs = listed[0] if len(listed) == 1 else listed
    if inputs is None:
        if given is None:
            raise TargetError(f"{path} does not say what its input is. Pass its shape without the batch by --input.")
        return tf.TensorSpec(given, keras.config.floatx())
    several = len(keras.tree.flatten(inputs)) > 1

    def spec_of(tensor: Any) -> Any:
        own = tuple(tensor.shape[1:])
        if given is None or several:
            if None in own:
                how = "cannot be told which of its inputs --input is for" if several else "--input gives it a shape"
                raise TargetError(f"{path} leaves dimensions of an input open, {_shape(own)}; {how}.")
            return tf.TensorSpec(own, tensor.dtype)
        if len(own) != len(given) or any(wanted not in (None, size) for wanted, size in zip(own, given, strict=True)):
            raise TargetError(f"{path} takes inputs of {_shape(own)}. Received: --input {','.join(map(str, given))}")
        return tf.TensorSpec(given, tensor.dtype)

    return keras.tree.map_structure(spec_of, inputs)


def _targets(model: Model, outputs: Any) -> Any:
    """Return zeros as targets of a sample: whole numbers without the last dimension where a loss is a sparse one."""
    import keras
    import tensorflow as tf

    def target(output: Any, loss: Any) -> Any:
        name = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
        shape = output.shape[1:]
        return tf.zeros(shape[:-1], "int32") if "sparse" in str(name).lower() else tf.zeros(shape, output.dtype)

    leaves = keras.tree.flatten(outputs)
    made = [target(output, loss) for output, loss in zip(leaves, _losses(model, outputs), strict=True)]
    return keras.tree.pack_sequence_as(outputs, made)


def _losses(model: Model, outputs: Any) -> list[Any]:
    """Return the loss of each output, None for one without: Keras finds those in a dict by the outputs' names."""
    import keras

    loss, count = model.loss, len(keras.tree.flatten(outputs))
    if isinstance(loss, dict):
        names = sorted(outputs) if isinstance(outputs, dict) else getattr(model, "output_names", None) or list(loss)
        listed = [loss.get(name) for name in names]
    elif isinstance(loss, (list, tuple)):
        listed = list(loss)
    else:
        listed = [loss] * count
    return listed if len(listed) == count else [next(iter(listed), None)] * count


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _words(inputs: Any) -> str:
    import keras

    return ", ".join(_shape(tuple(spec.shape)) for spec in keras.tree.flatten(inputs))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
