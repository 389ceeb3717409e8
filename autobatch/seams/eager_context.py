"""TensorFlow's eager context: the functions that are registered in it."""

from __future__ import annotations


def live_functions() -> set[str] | None:
    """The names of all functions that TensorFlow's eager context holds: each trace adds one, until it is freed.

    Private; seen in TensorFlow 2.20 and 2.21. None where it has moved: then retracing is not found.
    """
    try:
        from tensorflow.python.eager import context

        return set(context.context().list_function_names())
    except (ImportError, AttributeError):
        return None
