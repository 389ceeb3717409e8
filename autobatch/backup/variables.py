"""Values of variables by names that are the same in another process.

A variable that a strategy mirrors is several: a copy on each device. Of copies that are alike one is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.backup.fingerprint import numbered
from autobatch.seams.strategies import first_copy_of
from autobatch.seams.variables import in_order_of_creation
from autobatch.tensors.variables import bytes_of, components
from autobatch.types import Variable


def _named(variables: Iterable[Variable]) -> list[tuple[Any, str]]:
    kept = [variable for variable in components(variables) if variable.dtype != tf.string]
    return numbered((variable, variable.name.partition(":")[0]) for variable in in_order_of_creation(kept))


class LateValue:
    """Value of a variable that is read when it is written, where the host has no room for copies of all."""

    def __init__(self, variable: Variable) -> None:
        self._variable = variable
        self.dtype = variable.dtype.as_numpy_dtype
        self.shape = tuple(variable.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._variable.numpy())


def values_of(variables: Iterable[Variable], *, copies: bool, alike: Iterable[Variable] = ()) -> dict[str, Any]:
    """Return the value of each variable by its name: copies in host memory, or what is read when it is written.

    ``alike`` are variables whose copies on several devices have the same value, and are not read. A copy of another
    variable is kept if it differs from the first.
    """
    skipped = {id(variable) for variable in _other_copies(alike)}
    first: dict[int, Any] = {}
    found = {}
    for variable, name in _named(variables):
        before = first.get(id(first_copy_of(variable)))
        if before is None:
            first[id(variable)] = found[name] = variable.numpy() if copies else LateValue(variable)
        elif id(variable) not in skipped:
            own = variable.numpy()
            if own.tobytes() != np.asarray(before).tobytes():
                found[name] = own
    return found


def values_apart_from(variables: Iterable[Variable], alike: Iterable[Variable]) -> dict[str, Any]:
    """Return copies of the values of variables, each copy of them included, but for those that are ``alike``."""
    left_out = {id(variable) for variable in components(alike)}
    return {name: variable.numpy() for variable, name in _named(variables) if id(variable) not in left_out}


def _other_copies(variables: Iterable[Variable]) -> list[Any]:
    return [variable for variable in components(variables) if first_copy_of(variable) is not variable]


def bytes_kept(variables: Iterable[Variable], alike: Iterable[Variable] = ()) -> int:
    """Return the bytes of what :func:`values_of` returns at most."""
    skipped = {id(variable) for variable in _other_copies(alike)}
    return bytes_of(variable for variable in components(variables) if id(variable) not in skipped)


def missing(variables: Iterable[Variable], values: dict[str, Any]) -> list[str]:
    """Return the names of values that no variable of their shape has."""
    shapes = {name: variable.shape for variable, name in _named(variables)}
    return [name for name in sorted(values) if not _fits(shapes.get(name), values[name])]


def _fits(shape: Any, value: Any) -> bool:
    return shape is not None and bool(shape.is_compatible_with(np.shape(value)))


def assign(variables: Iterable[Variable], values: dict[str, Any]) -> None:
    """Give variables the values under their names, and copies without one that of the first; others keep their own."""
    named = _named(variables)
    names = {id(variable): name for variable, name in named}
    for variable, name in named:
        kept = name if name in values else names.get(id(first_copy_of(variable)))
        if kept in values:
            variable.assign(values[kept])
