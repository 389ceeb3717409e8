"""Call traced functions without what Python adds to each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.types import Tensor


def called_directly(compiled: Any) -> Callable[..., Any]:
    """A ``tf.function`` of leaves, and of tensors besides, without being looked up for its arguments at every call.

    That takes as long as the call itself; but it converts them, which ragged and sparse leaves need.
    """
    concrete = compiled.get_concrete_function()

    def call(leaves: list[Tensor], *others: Any) -> Any:
        function = concrete if all(isinstance(leaf, tf.Tensor) for leaf in leaves) else compiled
        return function(leaves, *others)

    return call
