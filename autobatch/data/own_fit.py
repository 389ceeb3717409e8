"""A model's own ``fit``: called on what its user has passed, up to where it calls Keras's.

What such a ``fit`` does to its arguments, as mapping a preprocessor over the data, is then done once, and by itself.
What it hands on to Keras is what is sized and trained on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from autobatch.data import random_states
from autobatch.data.fit_data import AS_THEY_COME, data_parts
from autobatch.seams import fitting
from autobatch.seams.optimizers import optimizers_of
from autobatch.step.attributes import attributes_kept
from autobatch.tensors.snapshots import Snapshot
from autobatch.types import Dataset, Model

Given = dict[str, Any]
"""Arguments of Keras's ``fit`` by name, without the model and the batch size."""

Instead = Callable[[Given, Callable[..., Any]], Any]
"""Function that is called in place of Keras's ``fit``, with what that was given and with Keras's ``fit`` itself."""

_DEEPEST = 8
"""Most calls that are followed from a ``fit`` to see whether it may call Keras's."""


def call_own_fit(
    model: Model, dataset: Dataset, y: Any, *, target_batch: int, options: dict[str, Any], instead: Instead
) -> Any:
    """Call ``model.fit`` with what its user has passed, and ``instead`` wherever it calls Keras's ``fit`` on the model.

    Raises:
        TypeError: it does not take these arguments, or hands on to Keras's what that does not take.
        ValueError: it does not call Keras's ``fit``.
    """
    name = type(model).__name__
    if not _may_call_keras(model):
        raise ValueError(_TRAINS_BY_ITSELF.format(name=name))
    args, options = _arguments(model, dataset, y, target_batch, options)
    under_way: list[bool] = []
    calls = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if self is not model or under_way:  # a callback's own fit, or that of another model
                return original(self, *args, **kwargs)
            try:
                given = fitting.given_to_fit(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"The fit of {name} hands on to Keras's what that does not take: {error}") from None
            calls += 1
            under_way.append(True)
            try:
                kept = {key: value for key, value in given.items() if key not in ("self", "batch_size")}
                if _is_grain(kept.get("x")) and _are_batches_of(target_batch, kept):
                    kept[AS_THEY_COME] = True
                return instead(kept, functools.partial(original, model))
            finally:
                under_way.clear()

        return fit

    with fitting.keras_fit_replaced(make):
        returned = model.fit(*args, **options)
    if not calls:
        raise ValueError(_TRAINS_BY_ITSELF.format(name=name))
    return returned


_TRAINS_BY_ITSELF = (
    "The fit of this model does not call Keras's own fit on the model, where autobatch takes over. Let it call "
    "super().fit, or give its loop to autobatch.wrap_step. Received: {name}"
)


class _Reached(BaseException):
    """Signal that Keras's ``fit`` was called; no handler of the user's for an ``Exception`` is to catch it."""

    def __init__(self, given: Given) -> None:
        super().__init__()
        self.given = given


def handed_to_keras(model: Model, dataset: Dataset, y: Any, *, target_batch: int) -> Given:
    """Return what the model's own ``fit`` hands on to Keras's, without training.

    What it changes before that, in variables, in numbers and containers that the model holds and in random states, is
    put back.

    Raises:
        TypeError, ValueError: as for :func:`call_own_fit`.
    """

    def stop(given: Given, _: Callable[..., Any]) -> Any:
        raise _Reached(given)

    with _nothing_changed(model):
        try:
            call_own_fit(model, dataset, y, target_batch=target_batch, options={}, instead=stop)
        except _Reached as reached:
            given = reached.given
        else:
            raise ValueError(_TRAINS_BY_ITSELF.format(name=type(model).__name__))
    return given


@contextlib.contextmanager
def _nothing_changed(model: Model) -> Iterator[None]:
    variables = [*model.variables, *(each for optimizer in optimizers_of(model) for each in optimizer.variables)]
    kept = Snapshot.on_host(variables)
    try:
        with attributes_kept(model), random_states.random_states_kept():
            yield
    finally:
        kept.restore()


# -- the arguments ----------------------------------------------------------------------------------------------------


def _arguments(
    model: Model, dataset: Dataset, y: Any, target_batch: int, options: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments, by position and by name, of the call that a user of plain Keras would write.

    Raises:
        TypeError: the model's ``fit`` does not take them, or wants others as well.
    """
    signature = inspect.signature(model.fit)
    parameters = signature.parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    x, y, sample_weight = data_parts(dataset, y, options.get("sample_weight"))
    args, named = [x], dict(options)
    if "x" in parameters and parameters["x"].kind is inspect.Parameter.KEYWORD_ONLY:
        args, named["x"] = [], x
    if sample_weight is not None:
        named["sample_weight"] = sample_weight
    if y is not None and "y" in parameters:
        named["y"] = y
    elif y is not None:
        args.append(y)
    if ("batch_size" in parameters or takes_any) and not _comes_in_batches(x):
        named["batch_size"] = target_batch
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        if y is not None and len(args) == 2 and takes_any:
            return args[:1], {**named, "y": y}
        raise TypeError(
            f"The fit of {type(model).__name__} cannot be called with the data and the options alone that autobatch "
            f"was given: {error}"
        ) from None
    return args, named


def _comes_in_batches(x: Any) -> bool:
    """Return True for data that Keras would take no batch size for."""
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        return True
    return hasattr(x, "__iter__") and not hasattr(x, "shape") and not isinstance(x, (list, tuple, dict))


def require_known_passes(given: Given, options: Given, target_batch: int) -> None:
    """Refuse Grain's data that a ``fit`` repeats, as KerasHub's does for all epochs, if they are to be cut again.

    Grain does not show how its batches were made. So the last batch of an epoch would be joined to the first of the
    next. ``given`` is what that ``fit`` hands on to Keras's, ``options`` what its user has passed.

    Raises:
        ValueError: they are such data.
    """
    steps = given.get("steps_per_epoch")
    if _is_grain(given.get("x")) and AS_THEY_COME not in given and steps != options.get("steps_per_epoch"):
        raise ValueError(
            f"The fit of this model repeats Grain's data, and counts {steps} of their batches as an epoch, so that "
            f"they cannot be joined or cut into others. Make batches of target_batch ({target_batch}) samples, or pass "
            f"arrays or a tf.data.Dataset. Received: batches of {_rows_in_first(given['x'])} samples"
        )


def _is_grain(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "grain"


def _are_batches_of(samples: int, given: Given) -> bool:
    """Return True if the first batch has as many samples, or is a whole epoch of fewer."""
    rows = _rows_in_first(given["x"])
    return rows == samples or (rows is not None and rows < samples and given.get("steps_per_epoch") == 1)


def _rows_in_first(x: Any) -> int | None:
    return next((len(part) for part in keras.tree.flatten(next(iter(x), None)) if part is not None), None)


# -- whether it calls Keras's fit -------------------------------------------------------------------------------------


def _may_call_keras(model: Model) -> bool:
    """Return False if no code that the model's ``fit`` is made of, or calls by name, mentions a ``fit``."""
    owners = [vars(model), *(vars(cls) for cls in type(model).__mro__)]
    found = next(owner["fit"] for owner in owners if "fit" in owner)
    return _mentions_fit(found, type(model), set(), _DEEPEST)


def _mentions_fit(function: Any, cls: type, seen: set[int], depth: int) -> bool:
    if fitting.is_keras_fit(function) or depth == 0:
        return True
    for name in ("__func__", "func", "__wrapped__"):
        inner = getattr(function, name, None)
        if inner is not None and id(inner) not in seen:
            seen.add(id(inner))
            if _mentions_fit(inner, cls, seen, depth - 1):
                return True
    if not isinstance(function, types.FunctionType):
        return not hasattr(function, "__func__")  # code that cannot be looked into
    if str(function.__module__).partition(".")[0] == "keras":
        return False
    names = _names_in(function.__code__)
    if "fit" in names:
        return True
    called = [vars(owner)[name] for name in names for owner in cls.__mro__ if name in vars(owner)]
    reached = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    reached += [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [value for value in reached if isinstance(value, types.ModuleType)]
    reached += [vars(module)[name] for module in modules for name in names if name in vars(module)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty yet
            reached.append(cell.cell_contents)
    for value in (*called, *reached):
        is_function = isinstance(value, (types.FunctionType, types.MethodType, functools.partial))
        if is_function and id(value) not in seen:
            seen.add(id(value))
            if _mentions_fit(value, cls, seen, depth - 1):
                return True
    return False


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names of attributes and globals, and the strings, in a function's code and in the code within it."""
    names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return names.union(*(_names_in(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))
