"""Loading of the function that builds the user's model: a file's, a module's, or one of ``keras.applications``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from autobatch.errors import TargetError
from autobatch.worker import keras_file
from autobatch.worker.messages import Message

# A synthetic data set is as large as anyone's effective batch; it is one sample repeated and takes no memory.
_SYNTHETIC_SAMPLES = 1 << 16
_INPUT_SHAPE = (224, 224, 3)


def load_target(options: Message, notes: list[str]) -> Callable[[], object]:
    """Return the function that the target names; what it finds out for the report it adds to ``notes``."""
    target: str = options["target"]
    place, _, name = target.rpartition(":")
    shape = None if options["input_shape"] is None else tuple(options["input_shape"])
    count = max(_SYNTHETIC_SAMPLES, options["target_batch"] or 0)
    if target.endswith(keras_file.ENDINGS):
        return lambda: keras_file.model_and_data(target, shape, count, notes)
    if place == "keras":
        return _keras_application(name, shape or _INPUT_SHAPE, options["classes"], count)
    sys.argv = [place]  # a file that reads its arguments must not meet ours
    module = _import_file(Path(place)) if place.endswith(".py") or os.sep in place else _import_module(place, target)
    try:
        function = getattr(module, name)
    except AttributeError:
        raise TargetError(f"{place} has no function {name!r}.{_did_you_mean(name, vars(module))}") from None
    if not callable(function):
        raise TargetError(f"{target} is not a function. Received: an object of type {type(function).__name__}")
    # Builtins and some classes have no signature to be read.
    with contextlib.suppress(ValueError, TypeError):
        signature = inspect.signature(function)
        needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in _NEEDED_KINDS]
        if needed:
            raise TargetError(f"{target} must be callable without arguments. It asks for: {', '.join(needed)}")
    return function  # type: ignore[no-any-return]


_NEEDED_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    sys.path.insert(0, str(path.parent))
    # Known by its own name, so that objects of its classes can be pickled; but a file called json.py must not become
    # everyone's json.
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"autobatch_target_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)) == path:
            raise TargetError(f"{path} cannot be read: {error.strerror}") from error
        raise
    return module


def _import_module(name: str, target: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(f"There is no module {error.name!r} for the target {target}.") from None
        raise


def _keras_application(name: str, input_shape: tuple[int, ...], classes: int, count: int) -> Callable[[], object]:
    """Return a function that builds a model of keras.applications with random weights, and synthetic data for it."""
    keras = needed_keras()
    known = {n: f for n, f in vars(keras.applications).items() if n[:1].isupper() and callable(f)}
    if name not in known:
        raise TargetError(f"keras.applications has no {name!r}.{_did_you_mean(name, known)}")

    def build() -> object:
        import numpy
        import tensorflow

        try:
            model = known[name](weights=None, input_shape=input_shape, classes=classes)
        except ValueError as error:
            shape = ",".join(map(str, input_shape))
            raise TargetError(f"keras:{name} with --input {shape} --classes {classes}: {error}") from error
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
        sample = (numpy.zeros(input_shape, "float32"), numpy.int32(0))
        return model, tensorflow.data.Dataset.from_tensors(sample).repeat(count)

    return build


def call_target(target: str, build: Callable[[], object]) -> tuple[Any, object, object]:
    returned = build()
    if isinstance(returned, tuple) and len(returned) in (2, 3) and _is_model(returned[0]):
        model, dataset = returned[0], returned[1]
        return model, dataset, returned[2] if len(returned) == 3 else None
    if isinstance(returned, tuple):
        received = f"({', '.join(type(item).__name__ for item in returned)})"
    else:
        received = "None" if returned is None else f"an object of type {type(returned).__name__}"
    raise TargetError(
        f"{target} must return (model, dataset), a compiled Keras model and its training data. Received: {received}"
    )


def _is_model(value: object) -> bool:
    return callable(getattr(value, "fit", None)) and callable(getattr(value, "train_step", None))


def needed_keras() -> Any:
    import keras

    return keras


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [known_name for known_name in known if not known_name.startswith("_")], 1)
    return f" Did you mean {close[0]!r}?" if close else ""
