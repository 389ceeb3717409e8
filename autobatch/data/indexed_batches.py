"""Batches of a PyDataset: a pass is gone on with by the index of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from autobatch.data.noted_batches import NotedBatches
from autobatch.data.random_states import RandomStates
from autobatch.seams import data_adapters


class IndexedBatches(NotedBatches):
    """Batches of the PyDataset behind Keras's ``adapter``."""

    def __init__(self, adapter: Any) -> None:
        super().__init__(adapter)
        data_adapters.generate_by(adapter, self._generate)

    def _generate(self, original: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        kept = self._begin()
        if kept is None:
            yield from self._noted(original())
            return
        now = RandomStates()
        RandomStates.from_plain(kept["at_begin"]).restore()  # a shuffle of the indices draws from them
        batches = original()
        with data_adapters.batches_unread(self._adapter, kept["batches"]):
            for _ in range(kept["batches"]):
                next(batches, None)
        (now if kept["random"] is None else RandomStates.from_plain(kept["random"])).restore()
        yield from self._noted(batches, kept["rows"])
