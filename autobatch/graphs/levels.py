"""The order of a traced step that updates its weights more than once: what runs in which part of it.

A micro-step is traced once. Its operations then get levels. At an odd level the micro-batches run, one after another.
At an even level that is done which is done once for all of them: an optimizer's update, and what the step assigns
without looking at the data, such as clipped weights or a target network. So level 1 is the first pass over the
micro-batches, level 2 the first update, level 3 the second pass, and so on.

Every operation gets the lowest level at which its inputs are there, and at which the variables that it reads have the
values that the step would read. A gradient that is taken after an update, but does not depend on it, so belongs to the
pass before. Two networks that do not see each other are trained in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autobatch.graphs.accesses import OUTSIDE, Accesses
from autobatch.graphs.draws import is_drawing
from autobatch.types import Graph, Operation, Tensor

FIRST_PASS = 1
"""Level of the first pass over the micro-batches."""


@dataclass(eq=False, slots=True)
class Interlude:
    """Something that is done once for all micro-batches, at a place of the trace.

    ``position`` counts the operations of the graph before it. ``tensors`` are what it needs, ``keys`` the variables
    that it changes (:meth:`.accesses.Accesses.key_of`), ``reads`` others that it reads when it is done. ``after_pass``
    is True if ``tensors`` are summed over the micro-batches. ``condition`` is a tensor that is true if it is to be done
    at all; None if it always is.
    """

    position: int
    tensors: Sequence[Tensor]
    keys: tuple[int, ...]
    reads: tuple[int, ...] = ()
    after_pass: bool = False
    condition: Any = None
    level: int = 0


def level_of_pass(level: int) -> int:
    """Return the lowest level, not below ``level``, at which micro-batches run."""
    return level | 1


def level_between(level: int) -> int:
    """Return the lowest level, not below ``level``, at which something is done once for all micro-batches."""
    return level + (level & 1)


@dataclass(slots=True)
class _State:
    """State of one variable at a place in the program."""

    written_at: int = 0
    used_at: int = 0
    """Highest level at which micro-batches use its present value."""
    needed_at: int = 0
    """Highest level at which an interlude reads its present value."""
    writes: list[int] = field(default_factory=list)
    readings: list[Any] = field(default_factory=list)
    """Operations that read its present value."""


class Levels:
    """Levels of the operations of one trace.

    Args:
        graph: the trace's graph.
        interludes: what is done once for all micro-batches, in the order of their positions.
        left_out: ranges of positions whose operations are no part of the step.
        by_micro_batch: keys of variables that every micro-batch changes, such as seeds and metrics' sums.
        after: for some tensors, by the id of the operation, another tensor whose total over all micro-batches it is.
        conditions: for some operations, by their ids, a tensor that is true if their effects count.
    """

    def __init__(
        self,
        graph: Graph,
        interludes: Sequence[Interlude],
        *,
        left_out: Iterable[range] = (),
        by_micro_batch: Iterable[int] = (),
        after: Mapping[int, Tensor] | None = None,
        conditions: Mapping[int, Tensor] | None = None,
    ) -> None:
        left = {position for each in left_out for position in each}
        self.accesses = Accesses(graph)
        self.operations: list[Any] = [
            operation for position, operation in enumerate(graph.get_operations()) if position not in left
        ]
        places = {id(operation): position for position, operation in enumerate(graph.get_operations())}
        self.position = {id(operation): places[id(operation)] for operation in self.operations}
        """Place of each operation in the graph, by its id."""
        self.interludes = interludes
        self._after = after or {}
        self._captured = {id(inner) for _, inner in graph.captures}
        self._access = {id(operation): self.accesses.of(operation) for operation in self.operations}
        self.conditions = {
            key: holds
            for key, holds in (conditions or {}).items()
            if key in self._access and self._access[key].must_run
        }
        """Tensors that are true if an operation with effects is to run, by the operation's id."""
        self._touched_at: dict[int, list[int]] = {}
        for operation in self.operations:
            access = self._access[id(operation)]
            for key in {*access.reads, *access.writes}:
                self._touched_at.setdefault(key, []).append(self.position[id(operation)])
        self._written = {key for access in self._access.values() for key in access.writes}
        self.by_micro_batch = {OUTSIDE, *by_micro_batch}
        """Keys of variables that every micro-batch changes."""
        while True:
            known = len(self.by_micro_batch)
            self._assign()
            if len(self.by_micro_batch) == known:
                break

    def access(self, operation: Operation) -> Any:
        """Return what an operation does to variables."""
        return self._access[id(operation)]

    def of(self, tensor: Tensor) -> int:
        """Return the level of a tensor: even if it is the same for all micro-batches."""
        return self._level[id(tensor.op)]

    def level_of(self, operation: Operation) -> int:
        """Return the level of an operation."""
        return self._level[id(operation)]

    def is_of_micro_batch(self, operation: Operation) -> bool:
        """Return True if an operation's outputs differ, or may differ, from one micro-batch to another."""
        return id(operation) in self._of_micro_batch

    def inputs_of(self, operation: Operation) -> list[Any]:
        """Return the tensors that an operation needs: its inputs, and the condition under which it runs."""
        condition = self.conditions.get(id(operation))
        return [*operation.inputs] if condition is None else [*operation.inputs, condition]

    def is_given(self, operation: Operation) -> bool:
        """Return True for a placeholder."""
        return bool(operation.type == "Placeholder")

    def is_read_at(self, operation: Operation, level: int) -> bool:
        """Return True if an operation reads, at this level, a variable that every micro-batch changes."""
        return level == self._level[id(operation)] or level in self._read_again_at.get(id(operation), ())

    def reads_state_of_micro_batch(self, operation: Operation) -> bool:
        """Return True if an operation reads a variable that every micro-batch changes."""
        return any(key in self.by_micro_batch for key in self._access[id(operation)].reads)

    def next_write(self, operation: Operation) -> int | None:
        """Return the level at which a variable that an operation reads is next changed; None if none is."""
        found = [
            self._states[key].writes[version]
            for key, version in self._versions.get(id(operation), ())
            if version < len(self._states[key].writes)
        ]
        return min(found, default=None)

    # -- assigning levels ---------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        self._level: dict[int, int] = {}
        self._of_micro_batch: set[int] = set()
        self._states: dict[int, _State] = {}
        self._roots: dict[int, frozenset[int]] = {}
        self._versions: dict[int, list[tuple[int, int]]] = {}
        self._read_again_at: dict[int, set[int]] = {}
        waiting = sorted(self.interludes, key=lambda interlude: interlude.position)
        for operation in self.operations:
            while waiting and waiting[0].position <= self.position[id(operation)]:
                self._place_interlude(waiting.pop(0))
            self._place(operation)
        for interlude in waiting:
            self._place_interlude(interlude)

    def _state(self, key: int) -> _State:
        return self._states.setdefault(key, _State())

    def _place(self, operation: Operation) -> None:
        access = self._access[id(operation)]
        inputs = [each.op for each in self.inputs_of(operation)]
        level = max((self._level[id(each)] for each in inputs), default=0)
        differs = any(id(each) in self._of_micro_batch for each in inputs)
        if operation.type == "Placeholder" and not self._is_captured(operation):
            level, differs = FIRST_PASS, True
        if id(operation) in self._after:
            level = max(level, self._level[id(self._after[id(operation)].op)])
        for key in access.reads:
            level = max(level, self._state(key).written_at)
            differs = differs or key in self.by_micro_batch
        roots = frozenset(access.reads).union(*(self._roots.get(id(each), frozenset()) for each in inputs))
        if access.seeded or is_drawing(operation.type):
            # What the draws of a micro-batch start from must move from one to the next.
            self.by_micro_batch |= roots & self._written
        own = [key for key in access.writes if key in self.by_micro_batch]
        if access.once and (differs or own or access.draws):
            differs = True
            self.by_micro_batch.update(access.writes)
        if not differs:
            self._roots[id(operation)] = roots
            if access.writes:
                level = self._level_of_write(operation, level)
            elif access.must_run:
                differs = True
        if differs:
            self._of_micro_batch.add(id(operation))
            for key in access.writes:
                state = self._state(key)
                level = max(level, state.written_at, state.used_at, state.needed_at)
            level = level_of_pass(level)
            for key in roots:
                self._state(key).used_at = max(self._state(key).used_at, level)
            for key in access.writes:
                self._read_with(operation, key, level)
        self._level[id(operation)] = level
        self._versions[id(operation)] = [(key, len(self._state(key).writes)) for key in access.reads]
        for key in access.reads:
            self._state(key).readings.append(operation)
        for key in access.writes:
            self._note_write(key, level)

    def _read_with(self, writing: Operation, key: int, level: int) -> None:
        """Note that what a write adds to is read at the write's level: others may add to it in the passes before."""
        for reading in self._state(key).readings:
            if self._level[id(reading)] < level and self._leads_to(reading, writing):
                self._read_again_at.setdefault(id(reading), set()).add(level)

    def _leads_to(self, operation: Operation, end: Operation) -> bool:
        last = self.position[id(end)]
        pending, seen = [operation], set()
        while pending:
            each = pending.pop()
            if each is end:
                return True
            if id(each) in seen or self.position.get(id(each), last) >= last:
                continue
            seen.add(id(each))
            pending += [consumer for output in each.outputs for consumer in output.consumers()]
        return False

    def _is_captured(self, operation: Operation) -> bool:
        return id(operation.outputs[0]) in self._captured

    def _level_of_write(self, operation: Operation, level: int) -> int:
        """Return the level of an assignment that does not look at the data."""
        keys = self._access[id(operation)].writes
        states = [self._state(key) for key in keys]
        earliest = level_between(max(level, *(max(state.written_at, state.needed_at) for state in states)))
        unseen = level_between(max(earliest, *(state.used_at for state in states)))
        # Before an earlier value was used, only where the new one is used in the same pass: the earlier one is kept.
        return unseen if all(self._is_left_alone(key, operation) for key in keys) else earliest

    def _is_left_alone(self, key: int, operation: Operation) -> bool:
        """Return True if no operation touches a variable behind ``operation`` before an interlude changes it."""
        position = self.position[id(operation)]
        touched = next((each for each in self._touched_at[key] if each > position), None)
        changed = next(
            (
                interlude.position
                for interlude in self.interludes
                if interlude.position > position and key in interlude.keys
            ),
            None,
        )
        return touched is None or (changed is not None and changed <= touched)

    def _note_write(self, key: int, level: int) -> None:
        state = self._state(key)
        state.written_at, state.used_at, state.needed_at, state.readings = level, 0, 0, []
        state.writes.append(level)

    def _place_interlude(self, interlude: Interlude) -> None:
        level = max((self._level[id(tensor.op)] for tensor in interlude.tensors), default=0)
        if interlude.after_pass:
            level = level_of_pass(level)
        if interlude.condition is not None:
            level = max(level, self._level[id(interlude.condition.op)])
        for key in interlude.keys:
            state = self._state(key)
            level = max(level, state.written_at, state.used_at, state.needed_at)
        for key in interlude.reads:
            level = max(level, self._state(key).written_at)
        interlude.level = level_between(level)
        for key in interlude.reads:
            self._state(key).needed_at = max(self._state(key).needed_at, interlude.level)
        for key in interlude.keys:
            self._note_write(key, interlude.level)
