"""Snapshots of variables, from which the values before a step are restored.

A copy on the device costs nothing until something is overwritten. Reading a resource variable shares its buffer, and
TensorFlow copies the buffer only when the variable is next updated in place. A copy on the host is a real one, and
takes no device memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from autobatch.tensors.variables import components
from autobatch.types import Variable


class Snapshot:
    """Values of some variables at one moment."""

    def __init__(self, variables: list[Variable], values: list[Any]) -> None:
        self._variables = variables
        self._values = values

    @classmethod
    def on_host(cls, variables: Iterable[Variable]) -> Snapshot:
        """Copy the values to host memory, so that no device memory is held for them."""
        found = components(variables)
        return cls(found, [variable.numpy() for variable in found])

    def restore(self) -> None:
        """Give every variable its value back, bit for bit."""
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)

    def drop(self) -> None:
        """Let go of the values, so that later updates need not copy them."""
        self._values = []
        self._variables = []


class InGraphSnapshot:
    """Values that a traced step itself keeps in separate variables before it does anything else.

    This saves one call compared to a snapshot taken before the step. Buffers are shared until a variable is updated.
    """

    def __init__(self, variables: Iterable[Variable]) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        for variable in components(variables):
            with tf.device(variable.device):
                copy = tf.Variable(
                    tf.zeros([0], variable.dtype),
                    shape=tf.TensorShape(None),
                    trainable=False,
                    name="autobatch_copy",
                )
            self._pairs.append((variable, copy))
        with tf.device("CPU:0"):
            self._times = tf.Variable(tf.constant(0, tf.int64), trainable=False, name="autobatch_times_kept")
        self._called = 0
        self._let_go: Callable[[], Any] | None = None
        self.are_of_failed_call = False
        """True if the last call failed after it had kept the values, and no other call was begun since."""

    def keep(self) -> Any:
        """Return an operation that keeps the values; trace it before everything else."""
        kept = [copy.assign(variable.read_value(), read_value=False) for variable, copy in self._pairs]
        with tf.control_dependencies(kept), tf.device("CPU:0"):
            return self._times.assign_add(1, read_value=False)

    @contextlib.contextmanager
    def around_call(self) -> Iterator[None]:
        """Enclose a call of the function that :meth:`keep` was traced into, and note whether it fails."""
        self.forget()
        self._called += 1
        try:
            yield
        except BaseException:  # an interrupt too may come before the values are kept or after
            times = int(self._times)
            self.are_of_failed_call = times == self._called
            self._called = times
            raise

    def forget(self) -> None:
        """Let :meth:`restore` do nothing until a call fails after keeping its values; keep the memory of the values."""
        self.are_of_failed_call = False

    def restore(self) -> None:
        """Give every variable back, bit for bit, its value from before a failed call, if that call had kept it."""
        if self.are_of_failed_call:
            for variable, copy in self._pairs:
                variable.assign(tf.ensure_shape(copy.read_value(), variable.shape))

    def drop(self) -> None:
        """Let go of the values."""
        self.forget()
        for variable, copy in self._pairs:
            with tf.device(variable.device):
                copy.assign(tf.zeros([0], variable.dtype), read_value=False)

    def let_go(self) -> None:
        """Let go of the values as :meth:`drop` does; quicker where it is done again and again.

        This is a call of its own. In one function with a loop, TensorFlow 2.21's optimizer of graphs took what is
        assigned here, which is empty, for values of the loop.
        """
        if self._let_go is None:
            self._let_go = tf.function(self.drop, autograph=False, input_signature=[]).get_concrete_function()
        self._let_go()


class SnapshotTaker:
    """Maker of repeated snapshots of the same variables, on the device, in one call each.

    ``beforehand`` is traced into that call, before the variables are read.
    """

    def __init__(self, variables: Iterable[Variable], *, beforehand: Callable[[], object] = lambda: None) -> None:
        self._variables = components(variables)

        def read() -> list[Any]:
            beforehand()
            return [variable.read_value() for variable in self._variables]

        self._read = tf.function(read, autograph=False, input_signature=[])
        self._concrete: Callable[[], list[Any]] | None = None

    def take(self) -> Snapshot:
        """Return the present values; buffers are shared with the variables until those are updated."""
        if self._concrete is None:  # quicker to call than a function that is looked up for its arguments
            self._concrete = self._read.get_concrete_function()
        return Snapshot(self._variables, list(self._concrete()))
