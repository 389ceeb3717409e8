"""Batches of a PyDataset, counted with their rows, so that a pass can be gone on with by the index of a batch.

What is behind is not asked for. Python's code that makes a batch may draw from the global random generators. So their
states before a batch that draws are noted, and put back before it is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras

from autobatch.data.random_states import RandomStates
from autobatch.seams import data_adapters
from autobatch.tensors.batch_structure import rows_of


@dataclass(slots=True)
class _Pass:
    """One pass: the batches behind which it began, with their rows, and those that were made since, in order."""

    behind: int = 0
    rows_behind: int = 0
    rows: list[int] = field(default_factory=list)
    states: list[RandomStates | None] = field(default_factory=list)
    """States before each batch, None for one that drew nothing; one entry more stands for the batch to come."""


class IndexedBatches:
    """Batches of the PyDataset behind Keras's ``adapter``; to be made before its ``tf.data.Dataset`` is."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._present = _Pass()
        self._kept: dict[str, Any] | None = None
        data_adapters.generate_by(adapter, self._generate)

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

    def _generate(self, original: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        kept, self._kept = self._kept, None
        self._present = present = _Pass()
        if kept is None:
            yield from self._noted(original(), present)
            return
        present.behind, present.rows_behind = kept["batches"], kept["rows_behind"]
        now = RandomStates()
        RandomStates.from_plain(kept["at_begin"]).restore()  # a shuffle of the indices draws from them
        batches = original()
        with data_adapters.batches_unread(self._adapter, kept["batches"]):
            for _ in range(kept["batches"]):
                next(batches, None)
        (now if kept["random"] is None else RandomStates.from_plain(kept["random"])).restore()
        for place, batch in enumerate(self._noted(batches, present)):
            yield _behind(batch, kept["rows"]) if place == 0 and kept["rows"] else batch

    @staticmethod
    def _noted(batches: Iterator[Any], present: _Pass) -> Iterator[Any]:
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
            yield batch


def _behind(batch: Any, rows: int) -> Any:
    return keras.tree.map_structure(lambda part: None if part is None else part[rows:], batch)
