"""Keras's own ``fit``: how a model's ``fit`` is told from it, and its temporary replacement.

A ``fit`` of the user's own may reach Keras's by ``super()``, or by a reference that was taken long before, as a
decorator's. Keras wraps the function to shorten tracebacks. Every reference leads through the cell of that wrapper's
closure, so the cell's content is replaced. Seen with Keras 3.14 and 3.15; ``tests/seams/test_fitting.py`` fails loudly
when it moves.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from keras.src.backend.tensorflow.trainer import TensorFlowTrainer as _Trainer

from autobatch.seams.patching import replaced

_WRAPPED = vars(_Trainer)["fit"]
_INSIDE = inspect.unwrap(_WRAPPED)
_SIGNATURE = inspect.signature(_INSIDE)


def is_keras_fit(function: Any) -> bool:
    """Return True if a function or method is Keras's own ``fit``, called on whatever model."""
    return getattr(function, "__func__", function) in (_WRAPPED, _INSIDE)


def overrides_fit(model: Any) -> bool:
    """Return True if calling ``model.fit`` does not call Keras's own ``fit`` at once."""
    return not is_keras_fit(model.fit)


def without_own_fit(model: Any) -> None:
    """Let ``model.fit`` be Keras's own from now on."""
    vars(model)["fit"] = types.MethodType(_WRAPPED, model)


def given_to_fit(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of Keras's ``fit`` by name, the model's included as ``self``.

    Raises:
        TypeError: Keras's ``fit`` does not take them.
    """
    return dict(_SIGNATURE.bind(*args, **kwargs).arguments)


@contextlib.contextmanager
def keras_fit_replaced(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace Keras's ``fit`` of every model by ``make(original)`` on this thread, while the context is open."""
    cell = _cell_of(_WRAPPED, _INSIDE)
    owner, name = (_Trainer, "fit") if cell is None else (cell, "cell_contents")
    with replaced(owner, name, make):
        yield


def _cell_of(function: Any, content: Any) -> types.CellType | None:
    """Return the cell of a wrapper's closure that holds ``content``, maybe replaced now; None if there is none."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return next((cell for name, cell in cells.items() if name == "fn" or cell.cell_contents is content), None)
