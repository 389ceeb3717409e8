"""Variables as TensorFlow's: unwrapped from Keras's, each once, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from autobatch.seams.variables import inner_of
from autobatch.types import Variable


def unwrap(variable: Variable) -> Variable:
    """The ``tf.Variable`` behind a Keras variable, or the ``tf.Variable`` itself."""
    is_keras = hasattr(variable, "regularizer") and not isinstance(variable, tf.Variable)
    return inner_of(variable) if is_keras else variable


def distinct(variables: Iterable[Variable]) -> list[Variable]:
    """Each ``tf.Variable`` once, in order, Keras's wrappers taken off."""
    found: dict[int, Any] = {}
    for variable in variables:
        inner = unwrap(variable)
        found.setdefault(id(inner), inner)
    return list(found.values())


def components(variables: Iterable[Variable]) -> list[Variable]:
    """Each ``tf.Variable`` once; of one that a strategy mirrors, its copy on each device of this process."""
    found: dict[int, Any] = {}
    for variable in distinct(variables):
        parts = variable.values if isinstance(variable, tf.distribute.DistributedValues) else (variable,)
        found.update((id(part), part) for part in parts)
    return list(found.values())


def bytes_of(variables: Iterable[Variable]) -> int:
    """The bytes that the variables' values take."""
    return sum(variable.shape.num_elements() * variable.dtype.size for variable in distinct(variables))
