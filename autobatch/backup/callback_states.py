"""State of callbacks: of Keras's own by name, of others by their ``get_state`` and ``set_state``.

Keras's callbacks forget what they know when a training begins. So their state is put back behind that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import keras

from autobatch.errors import warn
from autobatch.seams.versions import settle_early_stopping

_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen", "_current_epoch"),
    keras.callbacks.TensorBoard: ("_global_train_batch", "_global_test_batch", "_previous_epoch_iterations"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
}
"""Attributes that are the state of Keras's callbacks and of those derived from them."""


def states_of(callbacks: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the states of callbacks, in their order, as plain values and arrays."""
    return [_state_of(callback) for callback in callbacks]


def _state_of(callback: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"class": type(callback).__name__}
    if _has_own(callback):
        state["own"] = plain_copy(callback.get_state())
    names = _names(callback)
    if names:
        state["attributes"] = {name: plain_copy(getattr(callback, name)) for name in names if hasattr(callback, name)}
    if isinstance(callback, keras.callbacks.CSVLogger):
        state["bytes"] = _size(callback.filename)
    return state


def _has_own(callback: Any) -> bool:
    return hasattr(callback, "get_state") and hasattr(callback, "set_state")


def _names(callback: Any) -> list[str]:
    return [name for kind, names in _ATTRIBUTES.items() if isinstance(callback, kind) for name in names]


def plain_copy(value: Any) -> Any:
    """Return a copy of a state whose tensors are arrays; the original may change while the copy is written."""
    if isinstance(value, dict):
        return {key: plain_copy(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_copy(each) for each in value]
    if hasattr(value, "numpy"):
        return value.numpy()
    return value.copy() if hasattr(value, "copy") else value


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def prepare_callbacks(callbacks: Iterable[Any], states: list[dict[str, Any]]) -> None:
    """Before a training that goes on begins, let callbacks that write a file go on in it, behind the same line."""
    for callback, state in _paired(callbacks, states):
        if isinstance(callback, keras.callbacks.CSVLogger) and state.get("bytes") is not None:
            if (_size(callback.filename) or 0) >= state["bytes"]:
                os.truncate(callback.filename, state["bytes"])
            callback.append = True


def restore_callbacks(callbacks: Iterable[Any], states: list[dict[str, Any]]) -> None:
    """Put back the states of callbacks, after they were told that the training and its epoch begin."""
    for callback, state in _paired(callbacks, states):
        if state.get("attributes", {}).get("best") is not None:
            settle_early_stopping(callback)
        for name, value in state.get("attributes", {}).items():
            setattr(callback, name, value)
        if "own" in state and _has_own(callback):
            callback.set_state(state["own"])


def _paired(callbacks: Iterable[Any], states: list[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    """Return callbacks with their states, those of one class in their order; one that is new has none."""
    left = list(states)
    pairs = []
    for callback in callbacks:
        found = next((state for state in left if state["class"] == type(callback).__name__), None)
        if found is not None:
            left.remove(found)
            pairs.append((callback, found))
    return pairs


def warn_of_those_left_out(callbacks: Iterable[Any], states: list[dict[str, Any]]) -> None:
    """Warn of callbacks with a state in the backup that are no longer given, and of those that are new."""
    here = sorted(state["class"] for state in states_of(callbacks) if len(state) > 1)
    there = sorted(state["class"] for state in states if len(state) > 1)
    if here != there:
        warn(
            f"The callbacks are not those of the backup: {', '.join(there)} then, {', '.join(here)} now. Those that "
            "are new begin without a state."
        )
