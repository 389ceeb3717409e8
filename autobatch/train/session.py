"""One training: Keras's own ``fit`` over effective batches, with every step a transaction."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from autobatch.errors import NoFeasibleBatchError
from autobatch.records import Report
from autobatch.train import data_arrays, data_cut, data_seams, keras_seams, scaling
from autobatch.train.agreement import Alone
from autobatch.train.data import EffectiveBatches, EffectiveIterator
from autobatch.train.keeping import Keeper
from autobatch.train.lengths import LengthRule
from autobatch.train.recovery import Transaction
from autobatch.train.step import AccumulatedStep
from autobatch.train.watch import ONCE_STEADY, MemoryWatch
from autobatch.training_history import TrainingHistory

_DATA_OPTIONS = ("sample_weight", "class_weight", "shuffle")


def prepare_data(
    model: Any, dataset: Any, y: Any, *, target_batch: int, options: dict[str, Any], only_look: bool = False
) -> tuple[EffectiveBatches, dict[str, Any]]:
    """Turn ``fit``'s data and those of its options that concern data into effective batches.

    Returns them with the options that are left for Keras's ``fit``. ``only_look`` tells that nothing will be trained
    on them.
    """
    keras_seams.require_supported(model)
    remaining = dict(options)
    data = {name: remaining.pop(name) for name in _DATA_OPTIONS if name in remaining}
    x, y, sample_weight = _unpack(dataset, y, data.pop("sample_weight", None))
    data_arrays.require_usable(x, y, sample_weight)
    split = remaining.pop("validation_split", 0.0)
    if split and remaining.get("validation_data") is None:
        parts, remaining["validation_data"] = data_arrays.split_validation(x, y, sample_weight, split)
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
        **data,
    )
    return batches, remaining


def require_repeatable(dataset: Any) -> None:
    """Refuse data that can be read only once where they are only looked at."""
    if isinstance(dataset, types.GeneratorType):
        raise ValueError(
            "A generator can be read only once, and tune would use up its first batches. Pass arrays, a "
            "tf.data.Dataset or a keras.utils.PyDataset; or call autobatch.fit, which trains on what it has looked "
            f"at. Received: {dataset!r}"
        )


def train(
    model: Any,
    batches: EffectiveBatches,
    *,
    step: AccumulatedStep,
    report: Report,
    device: str,
    user_limit_bytes: int | None,
    options: dict[str, Any],
    memory_watch: bool,
    begin_at: int | None = None,
    lengths: LengthRule | None = None,
    keeper: Keeper | None = None,
    agreement: Alone | None = None,
) -> TrainingHistory:
    """Run ``model.fit`` by the report's plan; return its History with ``plan``, ``report`` and ``recoveries``.

    ``begin_at`` is the micro-batch to begin with, where a run before this one had to go below the plan's.
    """
    plan = report.plan
    assert plan is not None
    transaction = scaling.open_transaction(
        step,
        plan.micro_batch,
        agreement=agreement or Alone(),
        device=device,
        begin_at=begin_at,
        effective_batch=plan.effective_batch,
        memory_model=report.memory_model,
        lengths=lengths,
        keeper=keeper,
        user_limit_bytes=user_limit_bytes,
        headroom=report.environment.headroom,
    )
    options = dict(options)
    agreement = agreement or Alone()
    given = options.get("callbacks")
    callbacks = _callback_list(model, batches, options)
    for callback in scaling.callbacks_for(given, plan, transaction, model=model, agreement=agreement):
        callback.set_params(callbacks.params)
        callback.set_model(model)
        callbacks.callbacks.append(callback)
    if memory_watch and not any(isinstance(callback, MemoryWatch) for callback in callbacks.callbacks):
        watch = MemoryWatch(look_for_cause=ONCE_STEADY)  # nobody asked for a walk over all that is alive before
        watch.set_params(callbacks.params)
        watch.set_model(model)
        callbacks.callbacks.append(watch)
    with (
        _functions_replaced(model, transaction),
        _quiet_about_length(batches, options),
        scaling.in_fit(model, transaction),
    ):
        try:
            history = model.fit(batches, callbacks=callbacks, shuffle=False, **options)
        except NoFeasibleBatchError:
            for callback in callbacks.callbacks:
                # Files are closed and best weights restored, as at any other end; the backup to resume from is kept.
                if not isinstance(callback, keras.callbacks.BackupAndRestore):
                    callback.on_train_end()
            raise
        finally:
            step.release_accumulators()
    return TrainingHistory.of(history, plan=plan, report=report, recoveries=tuple(transaction.recoveries))


def _unpack(dataset: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
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


def _input_shapes(model: Any) -> list[tuple[str, Any]]:
    """Name and shape of each of the model's inputs, as far as they are known before it has seen data."""
    inputs = getattr(model, "inputs", None)
    if inputs:
        return [(tensor.name, tuple(tensor.shape)) for tensor in inputs]
    if not getattr(model, "built", False):
        return []
    config = model.get_build_config() or {}
    shape = config.get("input_shape")
    single = isinstance(shape, (tuple, list)) and all(size is None or isinstance(size, int) for size in shape)
    return [("", tuple(shape))] if single and shape else []


def _validation_data(data: Any, batch_size: int | None, target_batch: int, input_shapes: Any) -> Any:
    """Validation data as Keras takes them: samples of a ``tf.data.Dataset`` in batches, mapped files read as needed."""
    if isinstance(data, tf.data.Dataset):
        is_of_samples = data_cut.is_of_samples(data, input_shapes)
        return data.batch(batch_size or target_batch) if is_of_samples else data
    if isinstance(data, (tuple, list)) and len(data) <= 3 and data_seams.are_arrays(*data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        data_arrays.require_usable(x, y, sample_weight)
        if data_arrays.any_mapped(x, y):
            return data_arrays.MappedArrays(x, y, sample_weight, batch_size=batch_size, shuffle=False)
    return data


def _callback_list(model: Any, batches: EffectiveBatches, options: dict[str, Any]) -> Any:
    """The list that ``Model.fit`` would make of its options; made here, so that it can be ended after a failure."""
    callbacks = options.pop("callbacks", None)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    verbose = options.get("verbose", "auto")
    return keras.callbacks.CallbackList(
        callbacks,
        add_history=True,
        add_progbar=verbose != 0,
        verbose=verbose,
        epochs=options.get("epochs", 1),
        steps=options.get("steps_per_epoch") or batches.expected_batches,
        model=model,
    )


@contextlib.contextmanager
def _functions_replaced(model: Any, transaction: Transaction) -> Iterator[None]:
    """While this lasts, ``model.fit`` and ``model.evaluate`` run the transaction's steps.

    What a callback trains or tests on by itself, by ``train_on_batch``, ``test_on_batch`` or a ``fit`` of its own, goes
    to Keras's own functions.
    """
    own: dict[str, Callable[[Any], Any]] = {}

    def train_function(iterator: Any) -> Any:
        if not isinstance(iterator, EffectiveIterator):
            if "train" not in own:
                own["train"] = keras_seams.own_function(model, "train")
            return own["train"](iterator)
        return _several(model, iterator, transaction.train)

    def test_function(iterator: Any) -> Any:
        spec = getattr(iterator, "element_spec", None)
        if spec is None:
            if "test" not in own:
                own["test"] = keras_seams.own_function(model, "test")
            return own["test"](iterator)
        return _several(model, iterator, lambda data: transaction.evaluate(data, spec))

    before = model.train_function, model.test_function
    model.train_function, model.test_function = train_function, test_function
    try:
        yield
    finally:
        # What a callback has put there, by compile() say, is newer than what was there before.
        if model.train_function is train_function:
            model.train_function = before[0]
        if model.test_function is test_function:
            model.test_function = before[1]


def _several(model: Any, iterator: Any, once: Callable[[Any], Any]) -> Any:
    """Run ``steps_per_execution`` batches, as Keras's functions do; StopIteration if there was none left."""
    logs = None
    for _ in range(model.steps_per_execution):
        try:
            data = next(iterator)
        except StopIteration:
            if logs is None:
                raise
            break
        logs = once(data)
    return logs


@contextlib.contextmanager
def _quiet_about_length(batches: EffectiveBatches, options: dict[str, Any]) -> Iterator[None]:
    """Where nobody could know how many batches there are, reaching their end is no reason for Keras's warning."""
    with warnings.catch_warnings():
        if batches.num_batches is None and not options.get("steps_per_epoch"):
            warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield
