"""One training: Keras's own ``fit`` over effective batches, with every step a transaction."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from autobatch.backup.training_backup import TrainingBackup
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.data.effective_iterator import EffectiveIterator
from autobatch.errors import NoFeasibleBatchError
from autobatch.records import Report
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.replicas.devices import Devices
from autobatch.seams import models, progress_bars, versions
from autobatch.terminal import notices
from autobatch.train import in_tensorboard
from autobatch.train.started_again import StartedAgain
from autobatch.training_history import TrainingHistory
from autobatch.types import Model
from autobatch.watch.memory_watch import ONCE_STEADY, MemoryWatch


def train(
    model: Model,
    batches: EffectiveBatches,
    transaction: AnyTransaction,
    *,
    devices: Devices,
    report: Report,
    options: dict[str, Any],
    memory_watch: bool,
    keras_fit: Callable[..., Any],
    backup: TrainingBackup | None = None,
    again: StartedAgain | None = None,
) -> TrainingHistory:
    """Run ``keras_fit`` with each step a ``transaction``; return its History with plan, report and recoveries.

    ``report`` has the plan of the transaction. ``keras_fit`` is Keras's own ``fit`` of the model, ``options`` its
    options. ``backup`` keeps it, and goes on with what it has kept. ``again`` is what a process that was started again
    was told.
    """
    plan = report.plan
    assert plan is not None
    options = dict(options)
    given = options.get("callbacks")
    callbacks = _callback_list(model, batches, options)
    for callback in devices.callbacks(given, plan, transaction):
        _add(callback, callbacks, model)
    for callback in in_tensorboard.beside(callbacks.callbacks, report, transaction):
        _add(callback, callbacks, model)
    if memory_watch and not any(isinstance(callback, MemoryWatch) for callback in callbacks.callbacks):
        # Nobody asked for a walk over all that is alive before memory is seen to grow.
        _add(MemoryWatch(look_for_cause=ONCE_STEADY), callbacks, model)
    kept = (
        contextlib.nullcontext()
        if backup is None
        else backup.training(model, batches, transaction, callbacks=callbacks.callbacks, report=report, options=options)
    )
    with (
        kept,
        _functions_replaced(model, transaction, (lambda once: once()) if backup is None else backup.run),
        _quiet_about_length(batches, options),
        devices.during_fit(model, transaction),
        versions.adapters_admitted(),
        notices.training(lambda: progress_bars.is_open(callbacks.callbacks), quiet=options.get("verbose") == 0),
    ):
        if again is not None:
            again.begin_smaller(transaction, effective_batch=plan.effective_batch // plan.replicas)
        try:
            history = keras_fit(batches, callbacks=callbacks, shuffle=False, **options)
        except NoFeasibleBatchError:
            for callback in callbacks.callbacks:
                # Files are closed and best weights restored, as at any other end; the backup to resume from is kept.
                if not isinstance(callback, keras.callbacks.BackupAndRestore):
                    callback.on_train_end()
            raise
    return TrainingHistory.of(history, plan=plan, report=report, recoveries=tuple(transaction.recoveries))


def _add(callback: keras.callbacks.Callback, callbacks: Any, model: Model) -> None:
    """Add ``callback`` to a list of callbacks that Keras has made, as Keras would have."""
    callback.set_params(callbacks.params)
    callback.set_model(model)
    callbacks.callbacks.append(callback)


def _callback_list(model: Model, batches: EffectiveBatches, options: dict[str, Any]) -> Any:
    """Return the list that ``Model.fit`` would make of its options. Made here, it can be ended after a failure."""
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
def _functions_replaced(
    model: Model, transaction: AnyTransaction, run: Callable[[Callable[[], Any]], Any]
) -> Iterator[None]:
    """Let ``model.fit`` and ``model.evaluate`` run the transaction's steps, while the context is open.

    ``run`` calls what makes an execution's updates. Keras's own functions run what a callback trains or tests by
    itself: ``train_on_batch``, ``test_on_batch`` or a ``fit`` of its own. Where a callback has them made anew, or
    compiles the model, the transaction's steps are traced anew, and go on.
    """
    own: dict[str, Callable[[Any], Any]] = {}

    def train_function(iterator: Any) -> Any:
        if not isinstance(iterator, EffectiveIterator):
            if "train" not in own:
                own["train"] = models.own_function(model, "train")
            return own["train"](iterator)
        return run(lambda: _several(model, iterator, transaction.train))

    def test_function(iterator: Any) -> Any:
        spec = getattr(iterator, "element_spec", None)
        if spec is None:
            if "test" not in own:
                own["test"] = models.own_function(model, "test")
            return own["test"](iterator)
        return _several(model, iterator, lambda data: transaction.evaluate(data, spec))

    functions = {"train": train_function, "test": test_function}
    remade: set[str] = set()

    def remake(kind: str) -> Callable[[Any], Any]:
        remade.add(kind)
        own.pop(kind, None)
        if kind == "train":
            transaction.renew()
        else:
            transaction.renew_evaluation()
        return functions[kind]

    before = model.train_function, model.test_function
    model.train_function, model.test_function = train_function, test_function
    try:
        with models.making_replaced(model, remake):
            yield
    finally:
        # What was made anew meanwhile is newer than what was there before: Keras makes its own when it needs it.
        if model.train_function is train_function:
            model.train_function = None if "train" in remade else before[0]
        if model.test_function is test_function:
            model.test_function = None if "test" in remade else before[1]
        if model.train_function is None:
            # As after Keras's own fit: if a user puts None there, that asks for a trace of what is trainable then.
            model.make_train_function()


def _several(model: Model, iterator: Any, once: Callable[[Any], Any]) -> Any:
    """Run ``steps_per_execution`` batches, or those that are left, as Keras's functions do; return the last logs.

    Raises:
        StopIteration: No batch was left.
    """
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
    """Silence Keras's warning at the end of the data where nobody could know how many batches there are."""
    with warnings.catch_warnings():
        if batches.num_batches is None and not options.get("steps_per_epoch"):
            warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield
