"""Second references to the buffers of the variables that a function compiled by XLA writes.

XLA writes a variable in place where nothing else refers to its buffer. TensorFlow hands it such a buffer as its own. If
the function then runs out of memory, the buffer is given back to the allocator, although the variable still uses it:
the value is lost, and the process ends when the variable is let go of. (``PopulateExecutionInputBuffer`` in
``xla_launch_util.cc``, which serves every kind of device; seen with TensorFlow 2.21 on a CPU.)

With a second reference XLA writes elsewhere, and nothing is lost. While the function runs, that takes as much memory
again as the variables that it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from autobatch.graphs.writes import written_variables
from autobatch.tensors.snapshots import InGraphSnapshot
from autobatch.types import Graph, Variable


class SecondReferences:
    """Second references to those of ``variables`` that a traced function, of this ``graph``, writes."""

    def __init__(self, graph: Graph, variables: Iterable[Variable]) -> None:
        self._values = InGraphSnapshot(written_variables(graph, variables))

    def held_for(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``compiled``, the function, with the references taken anew before each of its calls."""

        def call(*given: Any) -> Any:
            with tf.control_dependencies([self._values.keep()]):
                return compiled(*given)

        return call

    def end_pass(self) -> None:
        """Let go of the references behind the last of several calls, in one call of its own."""
        self._values.let_go()

    def drop(self) -> None:
        """Let go of the references."""
        self._values.drop()
