"""Private parts of TensorFlow's traced functions, and their temporary replacement.

Seen with TensorFlow 2.16 to 2.21.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx as _ag_ctx

from autobatch.seams.patching import replaced

_FUNCTION = type(tf.function(lambda: None))
_CONSTANTS = (bool, int, float, complex, np.generic, np.ndarray, tf.Variable)


def converted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` converted by AutoGraph: Python's branches and loops over tensors become TensorFlow's."""

    def call(
        *args: Any, **kwargs: Any
    ) -> Any:  # AutoGraph converts what a function calls, but not a method it is given
        return function(*args, **kwargs)

    enabled = _ag_ctx.ControlStatusCtx(status=_ag_ctx.Status.ENABLED)
    result: Callable[..., Any] = tf.__internal__.autograph.tf_convert(call, enabled)
    return result


def functions_inlined() -> contextlib.AbstractContextManager[None]:
    """Run every ``tf.function`` that is called as its Python function, while the context is open.

    A ``tf.function`` would keep its first trace, with the replacements of that time and with tensors of a graph that is
    gone. So its own traces are neither used nor made. Keras's own functions are left alone.
    """

    def inlined(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            function = self.python_function
            if inspect.isroutine(function) and str(function.__module__).partition(".")[0] == "keras":
                return original(self, *args, **kwargs)
            signature = self.input_signature
            if signature is not None and not kwargs and len(signature) == len(args):
                args = tuple(map(_as_specified, args, signature))
            run = converted(function) if getattr(self, "_autograph", True) else function
            return tf.nest.map_structure(_as_tensor, run(*args, **kwargs))

        return call

    return replaced(_FUNCTION, "__call__", inlined)


def _as_specified(argument: Any, spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec) or not isinstance(argument, (*_CONSTANTS, list, tuple)):
        return argument
    return tf.convert_to_tensor(argument, spec.dtype)


def _as_tensor(value: Any) -> Any:
    return tf.convert_to_tensor(value) if isinstance(value, _CONSTANTS) else value
