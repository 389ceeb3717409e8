"""What the trace of a micro-step shows of a model's own code: what of it cannot be told to be exact.

A loss is known to be exact where what is differentiated is made of the results of Keras's losses, of what does not
depend on the data, and of nothing else; a gradient, where nothing but linear operations lies between the tape and the
optimizer. The sentences on what is not are in :mod:`autobatch.train.inexact`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from autobatch.train import graphs


class Traced:
    """Filled while one micro-step is traced; where it runs eagerly, with what is known without a graph."""

    def __init__(self) -> None:
        self.scalar_losses: tuple[str, ...] = ()
        """The names of losses that were seen to reduce the batch themselves."""
        self.scalar_metrics: tuple[str, ...] = ()
        """The names of metrics that make one number of a batch, of which that is not known to be a mean."""
        self.updated_in_parts: dict[str, str] = {}
        """By their names, why metrics that may be no sums over samples are updated with each micro-batch."""
        self.held_sample_bytes = 0
        """What is kept of a sample until the effective batch is through, for metrics that are to see it whole."""
        self.applied: list[Any] = []
        """The optimizers that were applied, in order."""
        self.adding_layers: list[Any] = []
        """The layers that called ``add_loss`` with what depends on the data."""
        self.changed_for: list[Any] = []
        """The optimizers whose gradients were changed, other than linearly, between the tape and ``apply``."""
        self.comparing = ""
        """The name of an operation that puts samples of a batch together on the way to what is differentiated."""
        self._losses: list[Any] = []
        self._is_keras_alone: bool | None = None
        self._gradients: list[Any] = []
        self._on_arguments: dict[Any, bool] = {}

    @property
    def is_keras_alone(self) -> bool:
        """Whether all that is differentiated is known to be made of Keras's losses; False where nothing is known."""
        return bool(self._is_keras_alone)

    def note_loss(self, loss: Any) -> None:
        """Note a result of a Keras loss whose share of the effective batch's is exact."""
        if _is_symbolic(loss):
            self._losses.append(loss)

    def note_added_loss(self, layer: Any, losses: Any) -> None:
        """Note that a layer calls ``add_loss``."""
        parts = [part for part in tf.nest.flatten(losses) if tf.is_tensor(part)]
        exact = [part for part in parts if _is_symbolic(part) and not self._depends_on_data(part)]
        if len(exact) < len(parts) and all(layer is not known for known in self.adding_layers):
            self.adding_layers.append(layer)

    def note_differentiated(self, target: Any, gradients: Any) -> None:
        """Note what a tape differentiated and what it returned."""
        parts = [part for part in tf.nest.flatten(target) if tf.is_tensor(part)]
        if all(_is_symbolic(part) for part in parts):
            alone = all(
                graphs.not_linear_in(part, self._losses, lambda each: not self._depends_on_data(each)) is None
                for part in parts
            )
            self._is_keras_alone = alone and self._is_keras_alone is not False
            operations = (graphs.comparing_operation(part) for part in parts if not self.comparing)
            self.comparing = next((each.name for each in operations if each is not None), self.comparing)
        self._gradients += [part for part in _dense_parts(gradients) if _is_symbolic(part)]

    def note_applied(self, optimizer: Any, gradients: list[Any]) -> None:
        """Note the gradients that an optimizer is given."""
        self.applied.append(optimizer)
        given = [part for part in _dense_parts(gradients) if _is_symbolic(part)]
        if not self._gradients or not given:
            return
        following = graphs.what_follows(self._gradients)
        for part in given:
            operation = graphs.not_linear_in(part, self._gradients, lambda each: id(each) not in following)
            # What a function does is not looked into.
            if operation is not None and not operation.type.endswith("PartitionedCall"):
                self.changed_for.append(optimizer)
                return

    def _depends_on_data(self, tensor: Any) -> bool:
        return graphs.depends_on_arguments(tensor, self._on_arguments)

    def forget_tensors(self) -> None:
        """Let go of the graph; what was found stays."""
        self._losses, self._gradients, self._on_arguments = [], [], {}


def _dense_parts(gradients: Any) -> list[Any]:
    parts = tf.nest.flatten(gradients)
    return [part.values if isinstance(part, tf.IndexedSlices) else part for part in parts if part is not None]


def _is_symbolic(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and hasattr(tensor, "graph")
