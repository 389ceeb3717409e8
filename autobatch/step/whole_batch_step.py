"""Keras's own step on a whole effective batch as one micro-batch, without accumulation.

Its update begins when every gradient is there. The step itself copies the variables that it changes before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.graphs.writes import written_variables
from autobatch.metrics.merged_logs import Logs
from autobatch.seams import models
from autobatch.seams.functions import functions_inlined
from autobatch.seams.optimizers import apply_of, capture_apply, gradients_already_reduced
from autobatch.seams.summaries import SummaryTurn
from autobatch.step import fixed_size
from autobatch.step.update_room import UpdateReserve
from autobatch.tensors.batch_structure import Structure
from autobatch.tensors.functions import called_directly
from autobatch.tensors.snapshots import InGraphSnapshot
from autobatch.types import Model, Optimizer, Tensor, Variable


class WholeBatchStep:
    """One model's compiled step, traced by :meth:`prepare`.

    Args:
        model: a compiled Keras model.
        structure: the structure of the data.
        touched: learns the variables that the trace shows.
        reserve: makes sure that the update has its memory.
        note_update: is called with the optimizer, the gradients and the variables of each update in the trace.
    """

    def __init__(
        self,
        model: Model,
        structure: Structure,
        touched: TouchedVariables,
        reserve: UpdateReserve,
        note_update: Callable[[Any, list[Any], list[Any]], None],
        summaries: SummaryTurn,
    ) -> None:
        self._model = model
        self._structure = structure
        self._touched = touched
        self._reserve = reserve
        self._note_update = note_update
        self._summaries = summaries
        self._compiled: Callable[..., Logs] | None = None
        self._samples: int | None = None
        self.copies: InGraphSnapshot | None = None
        """Copies of the variables that the step changes before its update; None if it runs eagerly or is not traced."""
        self.updates = 0
        """Number of updates in the step's trace, or in its last eager run."""

    def prepare(self, samples: int | None = None, *, every: bool = False) -> bool:
        """Trace the step unless it was traced before; return True if this call did it.

        ``samples`` are those of the batch. With ``every`` all batches have as many, and the trace has their number, as
        Keras's own then has. Otherwise it is left open; code that cannot do without gets it.
        """
        if self._compiled is not None and self._samples in (None, samples):
            return False
        if self._compiled is None and not every:
            try:
                self._compiled = self._trace(None)
            except Exception as error:
                if samples is None or not fixed_size.may_want_the_size(error):
                    raise
            else:
                return True
        self._compiled, self._samples = self._trace(samples), samples
        return True

    def run(self, leaves: list[Tensor]) -> Logs:
        """Run the step, which is traced, on all samples at once."""
        if self.copies is not None:
            self.copies.forget()
        assert self._compiled is not None
        return self._compiled(leaves)

    def rest(self) -> None:
        """Let go of the memory that is held between calls; the trace is kept."""
        if self.copies is not None:
            self.copies.drop()

    def has_not_reached_update(self) -> bool:
        """Return True if the call that has just failed did so before its first update."""
        return self.copies is not None and not self.copies.are_of_failed_call

    def _trace(self, samples: int | None) -> Callable[..., Logs]:
        specs = self._structure.specs_of(samples)

        def update(optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
            self.updates += 1
            self._note_update(optimizer, gradients, variables)
            present = [gradient for gradient in gradients if gradient is not None]
            with tf.control_dependencies(tf.nest.flatten(present, expand_composites=True)):
                held = [None if gradient is None else tf.identity(gradient) for gradient in gradients]
                # XLA allocates all that a compiled step needs before anything runs, and writes nothing before its end.
                room = contextlib.nullcontext() if self._model.jit_compile else self._reserve.update_of(variables)
                with room, gradients_already_reduced([optimizer]):
                    apply_of(optimizer)(held, variables)

        train_step = self._summaries.once(models.untraced(self._model.train_step))

        def step(leaves: list[Tensor]) -> Logs:
            self.updates = 0
            with functions_inlined(), capture_apply(self._touched.optimizers, update):
                return train_step(self._structure.pack(leaves))

        if self._model.run_eagerly:
            return step
        inner = tf.function(
            step, autograph=False, jit_compile=bool(self._model.jit_compile), input_signature=[specs]
        ).get_concrete_function()
        self._touched.note_graph(inner.graph)
        changed = written_variables(inner.graph, self._touched.changed_before_update)
        self.copies = copies = InGraphSnapshot(changed)

        def kept_step(leaves: list[Tensor]) -> Logs:
            with tf.control_dependencies([self._reserve.note_begun(False), copies.keep()]):
                return inner(leaves)

        compiled = tf.function(kept_step, autograph=False, input_signature=[specs])
        call = called_directly(compiled)

        def run(leaves: list[Tensor]) -> Logs:
            with copies.around_call():
                return call(leaves)

        return run
