"""Marks on the random operations of a trace: the layer whose call made them.

Seen with Keras 3.6 to 3.15 on TensorFlow 2.16 to 2.21. ``tests/graphs/test_draws.py`` fails when a piece moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from tensorflow.core.framework import attr_value_pb2 as _attr_value
from tensorflow.python.eager import context as _context
from tensorflow.python.eager import execute as _execute

from autobatch.seams.patching import replaced

OWNER = "_autobatch_layer"
"""Attribute of an operation that names the layer. TensorFlow leaves attributes that begin with an underscore alone."""


def running_layer() -> Any:
    """Return the innermost layer whose call is running on this thread; None outside of any."""
    scopes = _global_state.get_global_attribute("name_scope_stack") or []
    callers = (scope.caller for scope in reversed(scopes))
    return next((caller for caller in callers if isinstance(caller, keras.layers.Layer)), None)


def operations_marked(
    is_marked: Callable[[str], bool], mark: Callable[[], str]
) -> contextlib.AbstractContextManager[None]:
    """Mark operations of types that ``is_marked`` accepts with what ``mark`` returns, while the context is open.

    The mark is their attribute :data:`OWNER`. Every operation of a graph goes through ``Graph._create_op_internal``,
    the calls of functions included.
    """

    def marked(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(
            self: Any,
            op_type: str,
            inputs: Any,
            dtypes: Any = None,
            input_types: Any = None,
            name: Any = None,
            attrs: Any = None,
            *rest: Any,
            **named: Any,
        ) -> Any:
            if is_marked(op_type):
                attrs = {**(attrs or {}), OWNER: _attr_value.AttrValue(s=mark().encode())}
            return original(self, op_type, inputs, dtypes, input_types, name, attrs, *rest, **named)

        return create

    return replaced(tf.Graph, "_create_op_internal", marked)


@contextlib.contextmanager
def eager_operations_noted(note: Callable[[str], None]) -> Iterator[None]:
    """Call ``note`` with the type of every operation that runs eagerly on this thread, while the context is open."""

    def callback(op_type: Any, *_: Any, graph: Any = None, **__: Any) -> None:
        if graph is None:
            note(op_type if isinstance(op_type, str) else op_type.decode())

    # TensorFlow's own ``add_op_callback`` replaces this too, and puts it back under other threads' callbacks.
    with replaced(_execute, "execute", lambda original: _execute.execute_with_callbacks, on_every_thread=True):
        _context.context().add_op_callback(callback)
        try:
            yield
        finally:
            _context.context().remove_op_callback(callback)
