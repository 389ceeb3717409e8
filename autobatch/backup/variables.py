"""Values of variables by names that are the same in another process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.backup.fingerprint import numbered
from autobatch.seams.variables import in_order_of_creation
from autobatch.tensors.variables import bytes_of as bytes_of
from autobatch.tensors.variables import distinct
from autobatch.types import Variable


def _named(variables: Iterable[Variable]) -> list[tuple[Any, str]]:
    kept = [variable for variable in distinct(variables) if variable.dtype != tf.string]
    return numbered((variable, variable.name.partition(":")[0]) for variable in in_order_of_creation(kept))


class LateValue:
    """Value of a variable that is read when it is written, where the host has no room for copies of all."""

    def __init__(self, variable: Variable) -> None:
        self._variable = variable
        self.dtype = variable.dtype.as_numpy_dtype
        self.shape = tuple(variable.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._variable.numpy())


def values_of(variables: Iterable[Variable], *, copies: bool) -> dict[str, Any]:
    """Return the value of each variable by its name: copies in host memory, or what is read when it is written."""
    return {name: variable.numpy() if copies else LateValue(variable) for variable, name in _named(variables)}


def missing(variables: Iterable[Variable], values: dict[str, Any]) -> list[str]:
    """Return the names of values that no variable of their shape has."""
    shapes = {name: variable.shape for variable, name in _named(variables)}
    return [name for name in sorted(values) if not _fits(shapes.get(name), values[name])]


def _fits(shape: Any, value: Any) -> bool:
    return shape is not None and bool(shape.is_compatible_with(np.shape(value)))


def assign(variables: Iterable[Variable], values: dict[str, Any]) -> None:
    """Give variables the values under their names; one without a value keeps its own."""
    for variable, name in _named(variables):
        if name in values:
            variable.assign(values[name])
