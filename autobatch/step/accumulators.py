"""Sums of the gradients of an update's micro-batches, on one device.

Each variable that gets a gradient has one sum, of its own size. For large embedding tables the rows are kept instead
(:mod:`autobatch.step.embedding_rows`). The trace of a micro-batch shows which sums and rows are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.seams import models
from autobatch.seams.optimizers import ApplyHandler
from autobatch.step.embedding_rows import RowBuffer, tables_of
from autobatch.step.gradient_sums import Shares, add_to
from autobatch.tensors.batch_structure import Structure
from autobatch.tensors.variables import bytes_of, distinct
from autobatch.types import Model, Optimizer, Tensor, Variable


class Update(NamedTuple):
    """One optimizer's update: the variables that it is applied to, and for each whether it got a gradient."""

    optimizer: Optimizer
    variables: list[Variable]
    has_gradient: list[bool]

    @property
    def summed(self) -> list[Any]:
        """A ``tf.Variable`` for each variable that got a gradient."""
        pairs = zip(self.variables, self.has_gradient, strict=True)
        return [_inner(variable) for variable, has_gradient in pairs if has_gradient]


class Unit(NamedTuple):
    """A gradient that is summed up for one variable, in the pass ``begin``; ``slot`` counts the variable's sums."""

    variable: Variable
    gradient: Any
    begin: int
    slot: int


class Accumulators:
    """Sums of the gradients on one device.

    Args:
        model: a compiled Keras model.
        structure: the structure of the data.
        touched: is asked to ignore the sums.
        note_update: is called with the optimizer, the gradients and the variables of each update in a trace.
        most_samples: the most samples in an update; None keeps no rows.
        device: where the sums are; None puts each beside its variable.
    """

    def __init__(
        self,
        model: Model,
        structure: Structure,
        touched: TouchedVariables,
        note_update: Callable[[Any, list[Any], list[Any]], None],
        *,
        most_samples: int | None = None,
        device: str | None = None,
    ) -> None:
        self._model = model
        self._structure = structure
        self._touched = touched
        self._note_update = note_update
        self._device = device
        self._most_samples = most_samples
        self._sums: dict[Any, Any] = {}
        self._shapes: dict[int, Any] = {}
        """Shape of each sum by its id, which an empty one does not tell."""
        self._units: list[Unit] = []
        self._rests = False
        self._rows: dict[int, RowBuffer] = {}
        self.updates: list[Update] = []
        """Updates of the trace or eager run that was captured last."""

    @property
    def variables(self) -> list[Variable]:
        """Sums, in the order in which they were made; empty until they are expected or a micro-batch is traced."""
        return list(self._sums.values())

    @property
    def row_variables(self) -> list[Variable]:
        """Variables that rows are kept in."""
        return [variable for buffer in self._rows.values() for variable in buffer.variables]

    @property
    def tables_kept_as_rows(self) -> set[int]:
        """Ids of the tables whose rows are kept."""
        return set(self._rows)

    @property
    def least_bytes(self) -> int:
        """Lower bound on the bytes of the sums; known before anything is traced."""
        return bytes_of(self._model.trainable_variables) - bytes_of(self._possible_tables())

    def holds(self, samples: int) -> bool:
        """Return True if there is room for the rows of an update of ``samples`` samples."""
        return not self._rows or self._most_samples is None or samples <= self._most_samples

    def expect(self, variables: Iterable[Variable]) -> None:
        """Make the sums for variables that are sure to get gradients, before anything is traced."""
        for variable in variables:
            self._sum_of(_inner(variable))

    def expect_rows(self) -> None:
        """Make a buffer for the rows of every table that may use one; it takes no memory yet."""
        for table in self._possible_tables():
            buffer = self._rows[id(table)] = RowBuffer(table, _dtype_of_sum(table))
            self._touched.ignore(buffer.variables)

    def _possible_tables(self) -> list[Any]:
        if self._most_samples is None or self._model.jit_compile or self._model.run_eagerly:
            return []
        return tables_of(models.layers_of(self._model))

    def _sum_of(self, inner: Variable, slot: int = 0) -> Any:
        """Return the sum for a variable; a variable has several if updates of it are summed at the same time."""
        key: Any = (id(inner), slot) if slot else id(inner)
        if key not in self._sums:
            # Beside a buffer of rows the sum takes no memory before the trace shows which of the two is used.
            beside_rows = id(inner) in self._rows
            with tf.init_scope(), tf.device(self._device or inner.device):
                self._sums[key] = tf.Variable(
                    tf.zeros([0] if beside_rows else inner.shape, _dtype_of_sum(inner)),
                    shape=tf.TensorShape(None) if beside_rows else None,
                    trainable=False,
                    name="autobatch_accumulator",
                )
            self._shapes[id(self._sums[key])] = inner.shape
            self._touched.ignore([self._sums[key]])
        return self._sums[key]

    def capture(self, fraction: Tensor) -> ApplyHandler:
        """Return a handler for an optimizer's ``apply`` that adds the gradients, times ``fraction``, to the sums."""
        updates = self.updates = []

        def add(optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
            if tf.executing_eagerly():
                _require_updated_once(optimizer, variables, updates)
            self._note_update(optimizer, gradients, variables)
            updates.append(Update(optimizer, variables, [gradient is not None for gradient in gradients]))
            shares = Shares(fraction)
            for variable, gradient in zip(variables, gradients, strict=True):
                if gradient is not None:
                    self._add(_inner(variable), gradient, shares)

        return add

    def _add(self, inner: Variable, gradient: Tensor, shares: Shares) -> None:
        accumulator = self._sum_of(inner)
        buffer = self._rows.get(id(inner))
        if buffer is not None and self._keeps_rows(buffer, gradient):
            buffer.add(gradient, shares.of(accumulator.dtype)[0])
        else:
            add_to(accumulator, gradient, shares)

    def _keeps_rows(self, buffer: RowBuffer, gradient: Tensor) -> bool:
        is_of_rows = isinstance(gradient, tf.IndexedSlices) and self._most_samples is not None
        if not is_of_rows or not buffer.takes(gradient, self._structure, self._most_samples or 0):
            buffer.refused = True
        return not buffer.refused

    def settle(self) -> None:
        """Let go of the sums of variables that got no gradient; choose between rows and a sum for each table."""
        summed = {id(inner): inner for update in self.updates for inner in update.summed}
        rows = {
            key: buffer
            for key, buffer in self._rows.items()
            if buffer.rows_per_sample is not None and not buffer.refused
        }
        sums = {key: value for key, value in self._sums.items() if key in summed and key not in rows}
        for buffer in rows.values():
            assert self._most_samples is not None
            buffer.reserve(self._most_samples)
        for key in self._rows.keys() - rows.keys():
            if key in sums:
                sums[key].assign(tf.zeros(summed[key].shape, sums[key].dtype))
        self._touched.forget(value for key, value in self._sums.items() if key not in sums)
        self._touched.forget(each for key in self._rows.keys() - rows.keys() for each in self._rows[key].variables)
        self._sums, self._rows = sums, rows

    def settle_units(self, units: Sequence[Unit]) -> None:
        """Make the sums that a step with several passes needs, beyond those of :meth:`settle`."""
        self._units = list(units)
        for inner in [unit.variable for unit in units if unit.slot]:
            buffer = self._rows.pop(id(inner), None)  # rows for several updates at a time are added up
            if buffer is not None:
                buffer.release()
                self._touched.forget(buffer.variables)
        for unit in units:
            if id(unit.variable) not in self._rows:
                self._sum_of(unit.variable, unit.slot)

    def zero_units(self, zero: Any, places: Iterable[int]) -> None:
        """Set the sums of some units to ``zero``, see :meth:`zero`, and forget their rows."""
        for unit in [self._units[place] for place in places]:
            if id(unit.variable) in self._rows:
                self._rows[id(unit.variable)].clear()
            else:
                _fill(self._sum_of(unit.variable, unit.slot), zero)

    def add_unit(self, place: int, gradient: Tensor, shares: Shares) -> None:
        """Add a gradient, times a micro-batch's share, to the sum of a unit."""
        unit = self._units[place]
        if id(unit.variable) in self._rows:
            buffer = self._rows[id(unit.variable)]
            buffer.add(gradient, shares.of(_dtype_of_sum(unit.variable))[0])
        else:
            add_to(self._sum_of(unit.variable, unit.slot), gradient, shares)

    def gradients_of_units(self, places: Iterable[int | None]) -> list[Any]:
        """Return the gradients of the effective batch that some units have summed, None where there is no unit."""
        units = [None if place is None else self._units[place] for place in places]
        return [None if unit is None else self._gradient(unit.variable, None, unit.slot) for unit in units]

    def zero(self, zero: Any) -> None:
        """Set all sums to ``zero``, a float32 scalar that is no constant in the graph, and forget all rows.

        For a constant zero TensorFlow would keep a copy of each shape.
        """
        for accumulator in self._sums.values():
            _fill(accumulator, zero)
        for buffer in self._rows.values():
            buffer.clear()

    def sums(self) -> dict[int, Any]:
        """Return the values of the sums, by the id of the ``tf.Variable`` that each is the gradient of."""
        return {key: accumulator.read_value() for key, accumulator in self._sums.items()}

    def gradients_of(self, update: Update, sums: Mapping[int, Any] | None = None) -> list[Tensor]:
        """Return the gradients of the effective batch for one update, with None for a variable that has none.

        ``sums`` replace the device's own sums, for example by those over all replicas.
        """
        pairs = zip(update.variables, update.has_gradient, strict=True)
        return [self._gradient(_inner(each), sums) if has_gradient else None for each, has_gradient in pairs]

    def _gradient(self, inner: Variable, sums: Mapping[int, Any] | None, slot: int = 0) -> Any:
        if id(inner) in self._rows:
            return self._rows[id(inner)].gradient()
        value = self._sum_of(inner, slot).read_value() if sums is None else sums[id(inner)]
        value.set_shape(inner.shape)
        return tf.cast(value, inner.dtype)

    def rest(self) -> None:
        """Let go of the memory of the sums, which stay where traces know them; :meth:`reserve` takes it again."""
        for accumulator in self._sums.values():
            with tf.device(accumulator.device):
                empty = tf.zeros([0], accumulator.dtype)
            tf.raw_ops.AssignVariableOp(resource=accumulator.handle, value=empty)
        for buffer in self._rows.values():
            buffer.release()
        self._rests = True

    def reserve(self) -> None:
        """Take the memory of the sums again, if they rest."""
        if not self._rests:
            return
        for accumulator in self._sums.values():
            with tf.device(accumulator.device):
                zeros = tf.zeros(self._shapes[id(accumulator)], accumulator.dtype)
            tf.raw_ops.AssignVariableOp(resource=accumulator.handle, value=zeros)
        for buffer in self._rows.values():
            assert self._most_samples is not None
            buffer.reserve(self._most_samples)
        self._rests = False

    def release(self) -> None:
        """Let go of the sums and their memory.

        TensorFlow's registry of gradient functions keeps a traced update, and the buffers that it names, as long as the
        process lives. So the buffers are emptied first.
        """
        self.rest()
        self._rests = False
        self._touched.forget([*self._sums.values(), *self.row_variables])
        self._sums, self._shapes, self._rows, self.updates = {}, {}, {}, []


def _require_updated_once(optimizer: Optimizer, variables: list[Variable], before: list[Update]) -> None:
    known = {id(inner) for update in before for inner in distinct(update.variables)}
    again = [variable for variable in variables if id(_inner(variable)) in known]
    if again:
        raise ValueError(
            "train_step runs eagerly and updates the same weights more than once, so that no trace shows where to "
            "divide it. Leave run_eagerly=True out, or update them once with all gradients. Received: "
            f"{optimizer.name!r}, applied again to {again[0].name!r}"
        )


def _inner(variable: Variable) -> Any:
    return distinct([variable])[0]


def _fill(accumulator: Variable, zero: Any) -> None:
    accumulator.assign(tf.fill(tf.shape(accumulator), tf.cast(zero, accumulator.dtype)))


def _dtype_of_sum(inner: Variable) -> Any:
    """Return the dtype of a variable's sum: 32 bits for 16-bit gradients, as small additions would be lost in 16."""
    return tf.float32 if inner.dtype.size < 4 else inner.dtype
