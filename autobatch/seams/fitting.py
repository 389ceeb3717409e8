"""Keras's own ``fit``: how a model's ``fit`` is told from it, its temporary replacement, and the steps of its epochs.

A ``fit`` of the user's own may reach Keras's by ``super()``, or by a reference that was taken long before, as a
decorator's. Keras wraps the function to shorten tracebacks. Every reference leads through the cell of that wrapper's
closure, so the cell's content is replaced. Seen with Keras 3.6 to 3.15; ``tests/seams/test_fitting.py`` fails loudly
when it moves.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from keras.src.backend.tensorflow.trainer import TensorFlowTrainer as _Trainer
from keras.src.backend.tensorflow.trainer import TFEpochIterator as _TFEpochIterator

from autobatch.seams import tf_data
from autobatch.seams.patching import replaced
from autobatch.seams.versions import place_of_steps, steps_as_keras_takes_them, steps_as_triples

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


# -- the steps of an epoch --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def epochs_enumerated(adapter: Any, enumerate_epoch: Callable[[Any, Iterator[Any]], Iterator[Any]]) -> Iterator[None]:
    """Let ``enumerate_epoch(epoch, steps)`` give the steps of each epoch over ``adapter``, while the context is open.

    ``epoch`` is Keras's ``EpochIterator``. ``steps`` are its own steps: triples of the first and the last step of an
    execution, and the iterator over the data. Keras asks for the next one when the callbacks have seen the end of the
    one before, and for the first when they have seen the beginning of the epoch.
    """

    def instead(original: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def enumerate_iterator(self: Any) -> Iterator[Any]:
            steps = original(self)
            if self.data_adapter is not adapter:
                return steps
            return steps_as_keras_takes_them(enumerate_epoch(self, steps_as_triples(self, steps)))

        return enumerate_iterator

    with replaced(*place_of_steps(), instead):
        yield


def steps_in_pass(epoch: Any) -> tuple[int, int | None]:
    """Return the steps of the present pass over the data that an ``EpochIterator`` has given, and those it will have.

    The second is None where that is not known yet. With ``steps_per_epoch`` a pass may last for several epochs.
    """
    return epoch._steps_seen, epoch._num_batches


def know_length(epoch: Any, steps: int | None) -> None:
    """Tell an ``EpochIterator`` how many steps a pass has, as an earlier epoch found; None leaves it as it is."""
    if steps is not None:
        epoch._num_batches = steps


def count_earlier_steps(epoch: Any, steps: int) -> None:
    """Let an ``EpochIterator`` that has begun its first epoch count ``steps`` of the same pass in epochs before."""
    epoch._steps_seen += steps


class ValidationPasses:
    """Passes over the validation data that Keras's ``fit`` of ``model`` begins: each draws from the data's seeds.

    ``made`` are those of earlier processes, and of these those that were read. As many are drawn, and none of them is
    read, before the first one here. Keras 3.6 makes its passes elsewhere: there none is counted.
    """

    def __init__(self, model: Any, made: tuple[int, int] = (0, 0)) -> None:
        self._model = model
        self._to_draw = made
        self.made = made

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count passes while the context is open."""

        def instead(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def get_iterator(epoch: Any) -> Any:
                data = original(epoch)
                is_of_validation = epoch is getattr(self._model, "_eval_epoch_iterator", None)
                if is_of_validation:
                    self._count(data, is_read=not epoch._steps_seen)
                return data

            return get_iterator

        with replaced(_TFEpochIterator, "_get_iterator", instead):
            yield

    def _count(self, data: Any, *, is_read: bool) -> None:
        (begun, read), self._to_draw = self._to_draw, (0, 0)
        for place in range(begun):
            iter(data)
            if place < read:
                tf_data.draw_as_if_read(data)
        begun, read = self.made
        self.made = begun + 1, read + is_read


@contextlib.contextmanager
def epoch_logs_of(
    model: Any, logs: Callable[[], dict[str, Any] | None], at_end: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Let an epoch of ``model`` whose steps gave no logs end with ``logs()``, while the context is open.

    ``logs`` returns None where the epoch has had steps of its own. ``at_end`` is called at the end of each epoch, when
    the callbacks have seen the end of its last step, and at the end of each evaluation.
    """

    def instead(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get_metrics_result_or_logs(given: Any) -> Any:
            at_end()
            return original(given or logs() or given)

        return get_metrics_result_or_logs

    with replaced(model, "_get_metrics_result_or_logs", instead):
        yield
