"""The parts of a traced step that updates more than once: which operations run in which, and what passes between them.

:mod:`autobatch.graphs.levels` says from which level on each operation can run. Here it is settled what each level
computes, beginning with its *ends*: what it must bring about. A value that a later pass needs too is kept for each
micro-batch, in host memory, if all such values are small. Else it is computed again, from the weights that it was made
of; those that have been updated since are kept. A random draw is made once, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from autobatch.graphs.levels import Levels, level_between
from autobatch.types import Operation, Tensor

MOST_BYTES = 16 * 2**20
"""Most bytes that one pass may keep for an effective batch, of what could be computed again."""

_SIZES = frozenset(["Shape", "ShapeN", "Size", "Rank"])

_OPEN_DIMENSION = 1024
"""Size assumed for a dimension that varies, when bytes are estimated."""


@dataclass(slots=True)
class StepPart:
    """Work of one level: operations in their order, and what comes from other levels and goes to them.

    ``from_once`` and ``to_once`` hold tensors that are the same for all micro-batches; ``from_each`` and ``to_each``
    hold those with a value for each.
    """

    operations: list[Any] = field(default_factory=list)
    from_once: list[Any] = field(default_factory=list)
    from_each: list[Any] = field(default_factory=list)
    to_once: list[Any] = field(default_factory=list)
    to_each: list[Any] = field(default_factory=list)


class Parts:
    """Parts of a step, one for each level that has any ends.

    Args:
        levels: the levels of the traced step.
        ends: for each level the tensors that it must compute; operations that must run are added.
        whole: for tensors of a micro-batch that stand for the whole batch once it is through (what the step assigns to
            a running average), by their ids, the level from which on they do.
        statistics: ids of the tensors of a micro-batch that such values are made of.
        samples: the most samples in an effective batch.
        keeps_sizes: False if sizes of tensors must be known when a part is compiled, as for XLA.
    """

    def __init__(
        self,
        levels: Levels,
        ends: Mapping[int, Sequence[Tensor]],
        *,
        whole: Mapping[int, int],
        statistics: Iterable[int],
        samples: int,
        keeps_sizes: bool = True,
    ) -> None:
        self.levels = levels
        self._keeps_sizes = keeps_sizes
        self._sizes: dict[int, bool] = {}
        self._own: dict[int, list[Any]] = {level: list(tensors) for level, tensors in ends.items()}
        for operation in levels.operations:
            if levels.access(operation).must_run:
                self._own.setdefault(levels.level_of(operation), []).append(operation)
        self.whole = whole
        """Level from which on a tensor of a micro-batch stands for the whole batch, by the tensor's id."""
        self._statistics = set(statistics)
        self._samples = samples
        self.drawn_at: dict[int, int] = {}
        """Level of the pass that makes a random draw, by the operation's id."""
        self._tied: dict[int, bool] = {}
        self._closures = {level: self._closure(tensors) for level, tensors in self._own.items() if level % 2}
        while not self._settle():
            pass

    def _settle(self) -> bool:
        """Settle all parts, the last first; return False if a draw turned out to be needed in an earlier one."""
        self.by_level: dict[int, StepPart] = {level: StepPart() for level in self._own}
        """Parts by their levels."""
        self._left = float(MOST_BYTES)
        drawn_at = dict(self.drawn_at)
        for level in sorted((each for each in self._own if each % 2), reverse=True):
            self._settle_pass(level)
        pending = set(self.by_level)
        while any(level % 2 == 0 for level in pending):
            level = max(each for each in pending if each % 2 == 0)
            self._settle_between(level)
            pending = {each for each in self.by_level if each < level}
        return drawn_at == self.drawn_at

    def _part(self, level: int) -> StepPart:
        return self.by_level.setdefault(level, StepPart())

    # -- passes over the micro-batches --------------------------------------------------------------------------------

    def _settle_pass(self, level: int) -> None:
        ends = [*self._own[level], *self._part(level).to_each]
        candidates: dict[int, Any] = {}

        def keep_any(tensor: Tensor) -> bool:
            candidates[id(tensor)] = tensor
            return True

        walk = _PassWalk(self, level, keep_any)
        walk.visit(ends)
        if sum(map(self._bytes, candidates.values())) > self._left:
            kept: set[int] = set()
            room = self._left
            for tensor in sorted(candidates.values(), key=self._bytes):
                if self._bytes(tensor) <= room:
                    room -= self._bytes(tensor)
                    kept.add(id(tensor))
            walk = _PassWalk(self, level, lambda tensor: id(tensor) in kept)
            walk.visit(ends)
        self._left -= sum(self._bytes(each) for each in walk.from_each if id(each) in candidates)
        part = self._part(level)
        part.operations = self._in_order(walk.operations)
        part.from_once, part.from_each = list(walk.from_once.values()), list(walk.from_each_by_id.values())
        for tensor in part.from_once:
            self._give(self.level_of_value(tensor), tensor, once=True)
        for tensor in part.from_each:
            self._give(walk.home[id(tensor)], tensor, once=False)

    def level_of_value(self, tensor: Tensor) -> int:
        """Return the level between passes from which on a value that is the same for all micro-batches is there."""
        return self.whole[id(tensor)] if id(tensor) in self.whole else level_between(self.levels.of(tensor))

    def _give(self, level: int, tensor: Tensor, *, once: bool) -> None:
        given = self._part(level).to_once if once else self._part(level).to_each
        if all(tensor is not known for known in given):
            given.append(tensor)

    def _in_order(self, operations: Iterable[Operation]) -> list[Any]:
        return sorted(operations, key=lambda operation: self.levels.position[id(operation)])

    def _bytes(self, tensor: Tensor) -> float:
        """Return the bytes that a tensor takes for all samples; infinitely many where it cannot be kept."""
        if tensor.dtype in (tf.resource, tf.variant) or tensor.shape.rank is None:
            return math.inf
        sizes = [_OPEN_DIMENSION if size is None else size for size in tensor.shape[1:]]
        first = tensor.shape[0] if tensor.shape.rank else 1
        return float(math.prod(sizes) * (self._samples if first is None else first) * (tensor.dtype.size or 8))

    def _closure(self, ends: Iterable[Any]) -> set[int]:
        """Return the ids of the operations of a micro-batch that the ends are computed by."""
        pending = [getattr(end, "op", end) for end in ends]
        seen: set[int] = set()
        while pending:
            operation = pending.pop()
            if id(operation) not in seen and self.levels.is_of_micro_batch(operation):
                seen.add(id(operation))
                pending += [each.op for each in self.levels.inputs_of(operation)]
        return seen

    def first_use(self, operation: Operation, before: int) -> int | None:
        """Return the lowest pass before a level that computes an operation for its own ends; None if none does."""
        found = [level for level, closure in self._closures.items() if level < before and id(operation) in closure]
        return min(found, default=None)

    def is_kept_apart(self, operation: Operation) -> bool:
        """Return True if the outputs of an operation may be kept: all but sizes where these must be known."""
        return self._keeps_sizes or not self._is_size(operation)

    def _is_size(self, operation: Operation) -> bool:
        if id(operation) not in self._sizes:
            of_micro_batch = [each.op for each in operation.inputs if self.levels.is_of_micro_batch(each.op)]
            self._sizes[id(operation)] = operation.type in _SIZES or (
                bool(of_micro_batch)
                and all(output.dtype.is_integer for output in operation.outputs)
                and all(map(self._is_size, of_micro_batch))
            )
        return self._sizes[id(operation)]

    def is_tied_to_variables(self, operation: Operation) -> bool:
        """Return True if an operation of a micro-batch depends on weights, or on draws: not on the data alone."""
        pending, seen = [operation], []
        found = False
        while pending and not found:
            each = pending.pop()
            if id(each) in self._tied:
                found = self._tied[id(each)]
                continue
            self._tied[id(each)] = False
            seen.append(each)
            access = self.levels.access(each)
            found = bool(access.reads or access.draws or access.must_run)
            pending += [taken.op for taken in each.inputs]
        if found:
            for each in seen:
                del self._tied[id(each)]
            self._tied[id(operation)] = True
        return found

    # -- between passes -----------------------------------------------------------------------------------------------

    def _settle_between(self, level: int) -> None:
        part = self._part(level)
        levels = self.levels
        operations: dict[int, Any] = {}
        taken: dict[int, Any] = {}
        pending: list[Any] = [*self._own.get(level, ()), *part.to_once]
        seen: set[int] = set()
        while pending:
            each = pending.pop()
            if id(each) in seen or id(each) in self._statistics:
                continue
            seen.add(id(each))
            operation = getattr(each, "op", each)
            if id(operation) in operations or levels.is_given(operation):
                continue
            home = levels.level_of(operation)
            following = levels.next_write(operation)
            is_over = following is not None and following < level
            if home < level and (is_over or levels.access(operation).must_run):
                taken[id(each)] = each
                self._give(level_between(home), each, once=True)
                continue
            operations[id(operation)] = operation
            pending += levels.inputs_of(operation)
        part.operations = self._in_order(operations.values())
        part.from_once = list(taken.values())


class _PassWalk:
    """Walk back from the ends of one pass to what it is given."""

    def __init__(self, parts: Parts, level: int, keeps: Callable[[Any], bool]) -> None:
        self._parts = parts
        self._levels = parts.levels
        self._level = level
        self._keeps = keeps
        self._fresh: dict[int, bool] = {}
        self._operations: dict[int, Any] = {}
        self.from_once: dict[int, Any] = {}
        self.from_each_by_id: dict[int, Any] = {}
        self.home: dict[int, int] = {}
        """Level that computes a value that is kept for each micro-batch, by the tensor's id."""

    @property
    def operations(self) -> list[Any]:
        return list(self._operations.values())

    @property
    def from_each(self) -> list[Any]:
        return list(self.from_each_by_id.values())

    def visit(self, ends: Iterable[Any]) -> None:
        """Collect what the ends, tensors or operations, are computed by."""
        pending = list(ends)
        seen: set[int] = set()
        while pending:
            each = pending.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            operation = getattr(each, "op", each)
            if self._levels.is_given(operation):
                continue
            if not self._is_run_here(each, operation):
                continue
            if id(operation) not in self._operations:
                self._operations[id(operation)] = operation
                pending += self._levels.inputs_of(operation)

    def _is_run_here(self, tensor: Any, operation: Operation) -> bool:
        """Return True if the operation runs in this pass; else note where its output comes from."""
        levels = self._levels
        if not levels.is_of_micro_batch(operation):
            if self._is_fresh(operation):
                return True
            self.from_once[id(tensor)] = tensor
            return False
        if tensor is not operation and self._stands_for_whole(tensor):
            self.from_once[id(tensor)] = tensor
            return False
        home = self._home(tensor, operation)
        if home == self._level:
            return True
        self.from_each_by_id[id(tensor)] = tensor
        self.home[id(tensor)] = home
        return False

    def _home(self, tensor: Any, operation: Operation) -> int:
        """Return the level of the pass that computes an operation of a micro-batch for this pass."""
        levels, parts = self._levels, self._parts
        own = levels.level_of(operation)
        access = levels.access(operation)
        if access.must_run:
            return own
        if levels.reads_state_of_micro_batch(operation):
            return self._level if levels.is_read_at(operation, self._level) else own
        if access.draws:
            before = parts.drawn_at.get(id(operation), self._level)
            parts.drawn_at[id(operation)] = min(before, self._level)
            return parts.drawn_at[id(operation)]
        if own == self._level or tensor is operation or not parts.is_tied_to_variables(operation):
            return self._level
        if not parts.is_kept_apart(operation):
            return self._level
        used = parts.first_use(operation, self._level)
        if not self._is_fresh(operation):
            home = own
        elif used is not None:
            home = used
        else:
            return self._level
        return home if self._keeps(tensor) else self._level

    def _stands_for_whole(self, tensor: Tensor) -> bool:
        return self._parts.whole.get(id(tensor), self._level) < self._level

    def _is_fresh(self, operation: Operation) -> bool:
        """Return True if all variables that an operation depends on have, in this pass, the values that it is made of.

        For an operation of a micro-batch, what else it depends on is taken to be there.
        """
        pending = [(operation, False)]
        while pending:
            each, inputs_done = pending.pop()
            if id(each) in self._fresh:
                continue
            inputs = [taken.op for taken in each.inputs if not self._stands_for_whole(taken)]
            if inputs_done:
                self._fresh[id(each)] = self._is_itself_fresh(each) and all(self._fresh[id(one)] for one in inputs)
            elif self._is_kept_anyway(each):
                self._fresh[id(each)] = True
            else:
                pending.append((each, True))
                pending += [(one, False) for one in inputs]
        return self._fresh[id(operation)]

    def _is_kept_anyway(self, operation: Operation) -> bool:
        levels = self._levels
        if levels.is_given(operation):
            return True
        return levels.is_of_micro_batch(operation) and (
            levels.access(operation).once or levels.reads_state_of_micro_batch(operation)
        )

    def _is_itself_fresh(self, operation: Operation) -> bool:
        levels = self._levels
        if not levels.is_of_micro_batch(operation) and levels.access(operation).must_run:
            return False
        following = levels.next_write(operation)
        return following is None or following > self._level
