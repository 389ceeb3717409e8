"""TensorFlow's variables behind Keras's, each listed once, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from autobatch.seams.variables import inner_of
from autobatch.types import Variable


def unwrap(variable: Variable) -> Variable:
    """Return the ``tf.Variable`` behind a Keras variable; return a ``tf.Variable`` as it is."""
    is_keras = hasattr(variable, "regularizer") and not isinstance(variable, tf.Variable)
    return inner_of(variable) if is_keras else variable


def distinct(variables: Iterable[Variable]) -> list[Variable]:
    """Return each ``tf.Variable`` once, in order, without Keras's wrappers."""
    found: dict[int, Any] = {}
    for variable in variables:
        inner = unwrap(variable)
        found.setdefault(id(inner), inner)
    return list(found.values())


def components(variables: Iterable[Variable]) -> list[Variable]:
    """Return each ``tf.Variable`` once; for one that a strategy mirrors, its copy on each device of this process."""
    found: dict[int, Any] = {}
    for variable in distinct(variables):
        parts = variable.values if isinstance(variable, tf.distribute.DistributedValues) else (variable,)
        found.update((id(part), part) for part in parts)
    return list(found.values())


def bytes_of(variables: Iterable[Variable]) -> int:
    """Return the bytes that the variables' values take, each variable counted once."""
    return sum(variable.shape.num_elements() * variable.dtype.size for variable in distinct(variables))
