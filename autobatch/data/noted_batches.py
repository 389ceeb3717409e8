"""Batches of a loader, counted with their rows as they are made, so that a pass can be gone on with at one of them.

What is behind is not made again. Python's code that makes a batch may draw from the global random generators. So their
states before a batch that draws are noted, and put back before it is made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras

from autobatch.data.random_states import RandomStates
from autobatch.tensors.batch_structure import rows_of


@dataclass(slots=True)
class Pass:
    """One pass: the batches behind which it began, with their rows, and those that were made since, in order."""

    behind: int = 0
    rows_behind: int = 0
    rows: list[int] = field(default_factory=list)
    states: list[RandomStates | None] = field(default_factory=list)
    """States before each batch, None for one that drew nothing; one entry more stands for the batch to come."""


class NotedBatches:
    """Batches of the loader behind Keras's ``adapter``, noted; to be made before the adapter makes its dataset."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._present = Pass()
        self._kept: dict[str, Any] | None = None

    def dataset(self) -> Any:
        """Return the ``tf.data.Dataset`` that Keras's adapter makes of these batches."""
        return self._adapter.get_tf_dataset()

    def place_behind(self, rows: int) -> dict[str, Any] | None:
        """Return the place behind so many rows of the present pass: batches, their rows, and rows of the next one.

        None if it is not known: a batch had no rows to count.
        """
        present = self._present
        batches, behind = 0, present.rows_behind
        for each in present.rows:
            if each < 1 or behind + each > rows:
                break
            behind, batches = behind + each, batches + 1
        if behind > rows or (batches == len(present.rows) and behind < rows):
            return None
        states = present.states[batches]
        present.states[:batches] = [None] * batches  # places only move on
        return {
            "batches": present.behind + batches,
            "rows_behind": behind,
            "rows": rows - behind,
            "random": None if states is None else states.as_plain(),
        }

    def continue_from(self, place: dict[str, Any], at_begin: dict[str, Any]) -> None:
        """Let the next pass go on at a place; ``at_begin`` are the random states at the beginning of the pass."""
        self._kept = {**place, "at_begin": at_begin}

    def _begin(self) -> dict[str, Any] | None:
        """Begin a pass; return the place at which it is to go on, None at its beginning."""
        kept, self._kept = self._kept, None
        self._present = Pass() if kept is None else Pass(kept["batches"], kept["rows_behind"])
        return kept

    def _noted(self, batches: Iterator[Any], rows_gone: int = 0) -> Iterator[Any]:
        """Yield the ``batches`` of the present pass, the first without ``rows_gone`` of its rows."""
        present = self._present
        present.states.append(None)
        while True:
            before = RandomStates()
            if present.states[-1] is not None:
                before.share(present.states[-1])
            batch = next(batches, None)
            if batch is None:
                return
            after = RandomStates()
            drew = not before.same_as(after)
            after.share(before)
            present.states[-1] = before if drew else None
            present.states.append(after if drew else None)
            present.rows.append(rows_of(batch)[0] or 0)
            yield _without(batch, rows_gone) if rows_gone else batch
            rows_gone = 0


def _without(batch: Any, rows: int) -> Any:
    return keras.tree.map_structure(lambda part: None if part is None else part[rows:], batch)
