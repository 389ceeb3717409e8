"""Take and restore every variable that a step can touch.

On the device a copy costs nothing until something is overwritten: reading a resource variable shares its buffer, and
TensorFlow copies the buffer only when the variable is next updated in place. On the host it is a real copy, and no
device memory is held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def unwrap(variable: Any) -> Any:
    """The ``tf.Variable`` behind a Keras variable, or the ``tf.Variable`` itself."""
    return variable.value if hasattr(variable, "regularizer") and not isinstance(variable, tf.Variable) else variable


def distinct(variables: Iterable[Any]) -> list[Any]:
    """Each ``tf.Variable`` once, in order, Keras's wrappers taken off."""
    found: dict[int, Any] = {}
    for variable in variables:
        inner = unwrap(variable)
        found.setdefault(id(inner), inner)
    return list(found.values())


def bytes_of(variables: Iterable[Any]) -> int:
    """The bytes that the variables' values take."""
    return sum(variable.shape.num_elements() * variable.dtype.size for variable in distinct(variables))


class Snapshot:
    """The values of some variables at one moment.

    ``on_host`` copies them to host memory, so that a search or a trial holds no device memory for them.
    """

    def __init__(self, variables: Iterable[Any], *, on_host: bool = False) -> None:
        self._variables = distinct(variables)
        self._values: list[Any] = [
            variable.numpy() if on_host else variable.read_value() for variable in self._variables
        ]

    def restore(self) -> None:
        """Give every variable its value back, bit for bit."""
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)

    def drop(self) -> None:
        """Let go of the values; from here on an update copies nothing."""
        self._values = []
        self._variables = []
