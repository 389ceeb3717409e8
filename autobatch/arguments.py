"""Checks of what users pass to ``fit`` and ``tune``, before anything is run. Standard library only."""

from __future__ import annotations

import inspect
import operator
import re
import sys
from typing import Any

from autobatch.types import Model
from autobatch.units import format_bytes, parse_bytes


def positive_int(value: Any, name: str, remedy: str = "") -> int:
    """Return ``value`` as an int of at least 1.

    Raises:
        TypeError: it is no whole number; True and False are none either.
        ValueError: it is less than 1.
    """
    message = f"{name} must be a whole number of at least 1{remedy and f': {remedy}'}. Received: {value!r}"
    if isinstance(value, bool):
        raise TypeError(message)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if number < 1:
        raise ValueError(message)
    return number


def target_batch(value: Any) -> int:
    """Check ``target_batch``; see :func:`positive_int`."""
    return positive_int(value, "target_batch", "the number of samples that one optimizer update averages over")


def micro_batch(value: Any) -> int | None:
    """Check ``micro_batch``: None for "auto", else the size.

    Raises:
        TypeError, ValueError: it is neither "auto" nor a whole number of at least 1.
    """
    if isinstance(value, str):
        if value == "auto":
            return None
        raise ValueError(f'micro_batch must be "auto" or a whole number of at least 1. Received: {value!r}')
    return positive_int(value, "micro_batch", 'samples in one forward and backward pass, or "auto" to search')


def headroom(value: Any, limit_bytes: int | None = None) -> float:
    """Check ``headroom``, what is left alone of the limit: a share in [0, 1), or bytes as text; return those as an int.

    :func:`autobatch.units.less_headroom` tells the two apart by their types.
    """
    message = (
        'headroom must be a number from 0 up to but not including 1, or bytes as "500MiB"; a share is a number such as '
        f"0.05 for 5 %. Received: {value!r}"
    )
    if isinstance(value, str):
        if not value.strip()[-1:].isalpha():  # a number without a unit might be meant as percent
            raise TypeError(message)
        try:
            size = parse_bytes(value, name="headroom")
        except ValueError:
            raise ValueError(message) from None
        require_left(size, limit_bytes, "memory_limit")
        return size
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    if not 0 <= value < 1:
        raise ValueError(message)
    return float(value)


def require_left(headroom_bytes: int, limit_bytes: int | None, source: str) -> None:
    """Refuse a headroom that leaves nothing of a limit."""
    if limit_bytes is not None and headroom_bytes >= limit_bytes:
        raise ValueError(
            f"headroom must leave something of the limit, which is {format_bytes(limit_bytes)} ({source}). "
            f"Received: {format_bytes(headroom_bytes)}"
        )


def worker_timeout(value: Any) -> float:
    """Check ``worker_timeout``; see :func:`seconds`."""
    return seconds(value, "worker_timeout")


def seconds(value: Any, name: str) -> float:
    """Return ``value`` as a finite number of seconds above 0."""
    message = f"{name} must be a number of seconds above 0. Received: {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    if not 0 < value < float("inf"):
        raise ValueError(message)
    return float(value)


def memory_limit(value: Any) -> int | None:
    """Check ``memory_limit``: None, or bytes; see :func:`autobatch.units.parse_bytes`."""
    return None if value is None else parse_bytes(value)


def cache(value: Any) -> bool:
    """Check ``cache``: True or False, and not a folder.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(
            "cache must be True or False; where results are remembered, the environment variable AUTOBATCH_CACHE_DIR "
            f"says. Received: {value!r}"
        )
    return value


def true_or_false(value: Any, name: str) -> bool:
    """Check an option that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False. Received: {value!r}")
    return value


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|min|h)\s*")


def backup_every(value: Any) -> tuple[float, int | None]:
    """Return the seconds between two backups, and the updates; one of the two counts, the updates if there are any.

    Raises:
        TypeError, ValueError: it is neither a time nor a whole number of updates of at least 1.
    """
    message = (
        'backup_every must be a time such as "60s", "5min" or "1h", or a whole number of updates of at least 1. '
        f"Received: {value!r}"
    )
    if isinstance(value, str):
        match = _TIME.fullmatch(value)
        if match is None or not 0 < float(match.group(1)) < float("inf"):
            raise ValueError(message)
        return float(match.group(1)) * _SECONDS[match.group(2)], None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(message)
    if operator.index(value) < 1:
        raise ValueError(message)
    return float("inf"), operator.index(value)


OLDEST_TENSORFLOW = (2, 16)
OLDEST_KERAS = (3, 6)


def require_versions() -> None:
    """Refuse a TensorFlow or a Keras that is imported and too old. The seams would not find in it what they need.

    Raises:
        ValueError: names what is too old, and the remedy.
    """
    for name, package, oldest in (("TensorFlow", "tensorflow", OLDEST_TENSORFLOW), ("Keras", "keras", OLDEST_KERAS)):
        version = str(getattr(sys.modules.get(package), "__version__", ""))
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers and numbers < oldest:
            least = ".".join(map(str, oldest))
            raise ValueError(
                f'autobatch needs {name} {least} or newer: run pip install "{package}>={least}". '
                f"Received: {name} {version}"
            )


_OLDER_KERAS = ("tf_keras", "tensorflow.python.keras", "keras.engine", "keras.src.engine")


def require_keras_3(model: Any) -> None:
    """Refuse a model of an older Keras, or of Keras on another backend, before anything is imported that fails there.

    Raises:
        TypeError: it is a model of Keras 2, as ``tf.keras`` makes with ``TF_USE_LEGACY_KERAS=1``.
        ValueError: Keras runs on another backend than TensorFlow, or it or TensorFlow is too old.
    """
    modules = [f"{base.__module__}." for base in type(model).__mro__]
    if any(module.startswith(f"{older}.") for module in modules for older in _OLDER_KERAS):
        raise TypeError(
            "autobatch works with models of Keras 3, and this one is of Keras 2 (tf_keras, which tf.keras is with "
            "TF_USE_LEGACY_KERAS=1): unset TF_USE_LEGACY_KERAS and make the model with keras. "
            f"Received: {type(model).__module__}.{type(model).__qualname__}"
        )
    backend = getattr(getattr(sys.modules.get("keras"), "backend", None), "backend", None)
    if backend is not None:
        require_backend(backend())
    require_versions()


def require_backend(backend: str) -> None:
    """Refuse Keras on another backend than TensorFlow."""
    if backend != "tensorflow":
        raise ValueError(
            "autobatch works with Keras on the TensorFlow backend alone: set KERAS_BACKEND=tensorflow before keras is "
            f"imported. Received: the backend {backend!r}"
        )


def require_fit_options(model: Model, options: dict[str, Any]) -> None:
    """Refuse ``batch_size``, ``x``, and options that this model's ``fit`` does not have.

    Raises:
        TypeError: One of the options cannot be passed on.
    """
    if "batch_size" in options:
        raise TypeError(
            "batch_size is not an option of autobatch.fit: target_batch is the number of samples that one update "
            "averages over, and micro_batch what is on the device at a time. Pass target_batch instead. "
            f"Received: batch_size={options['batch_size']!r}"
        )
    if "x" in options:
        raise TypeError("The data are the second argument of autobatch.fit, not x. Received: x=...")
    known = inspect.signature(model.fit).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"This model's fit has no option of that name. Received: {', '.join(unknown)}")
