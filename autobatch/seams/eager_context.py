"""TensorFlow's eager context: the functions that are registered in it."""

from __future__ import annotations


def live_functions() -> set[str] | None:
    """Return the names of all functions in TensorFlow's eager context: each trace adds one, until it is freed.

    This reads a private name, seen in TensorFlow 2.16 to 2.21. Where that has moved, None is returned and retracing is
    not found.
    """
    try:
        from tensorflow.python.eager import context

        return set(context.context().list_function_names())
    except (ImportError, AttributeError):
        return None
