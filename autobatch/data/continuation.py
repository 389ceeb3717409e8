"""Going on with data in another process: behind the batches that were taken, in the same order."""

from __future__ import annotations

import abc
import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from autobatch.data import arrays, economy
from autobatch.data.effective_iterator import OpenEndedAdapter
from autobatch.data.indexed_batches import IndexedBatches
from autobatch.data.noted_batches import NotedBatches
from autobatch.data.passes import Passes
from autobatch.data.random_states import RandomStates
from autobatch.data.stateful_batches import StatefulBatches, iterators_of
from autobatch.seams import data_adapters
from autobatch.types import Dataset


class EpochCalls:
    """Calls of a PyDataset's ``on_epoch_begin`` and ``on_epoch_end``, which may change its order, to be made again.

    ``adapter`` is Keras's adapter of the data. A dataset with ``get_state`` and ``set_state`` is asked for its state
    instead.
    """

    def __init__(self, adapter: Any, *, keeps_order: bool) -> None:
        self._adapter = adapter
        self._dataset: Any = data_adapters.py_dataset_of(adapter) if keeps_order else None
        dataset = self._dataset
        self._has_state = dataset is not None and hasattr(dataset, "get_state") and hasattr(dataset, "set_state")
        self._records = dataset is not None and not self._has_state and data_adapters.has_epoch_hooks(dataset)
        self._made: list[dict[str, Any]] = []
        self._kept: dict[str, Any] | None = None

    def begin(self) -> None:
        """Begin an epoch; the first one after a restart begins as the interrupted one did."""
        kept, self._kept = self._kept, None
        if kept is None:
            self._call("on_epoch_begin", self._adapter.on_epoch_begin)
            return
        if self._has_state:
            self._adapter.on_epoch_begin()
            self._dataset.set_state(kept["state"])
            return
        *earlier, last = kept["calls"] or [None]
        for call in earlier[len(self._made) :]:
            self._made.append(call)
            self._set_random(call)
            getattr(self._dataset, call["name"])()
        self._set_random(last)
        self._call("on_epoch_begin", self._adapter.on_epoch_begin)

    def end(self) -> None:
        """End an epoch."""
        self._call("on_epoch_end", self._adapter.on_epoch_end)

    def _set_random(self, call: dict[str, Any] | None) -> None:
        if call is not None and call["random"] is not None:
            RandomStates.from_plain(call["random"]).restore()

    def _call(self, name: str, function: Callable[[], None]) -> None:
        kept = self._kept["calls"] if self._records and self._kept is not None else []
        if len(self._made) < len(kept) - 1:  # one that Keras makes before the first epoch, as it did then
            self._set_random(kept[len(self._made)])
        before = RandomStates() if self._records else None
        function()
        if before is not None:
            drew = not before.same_as(RandomStates())
            self._made.append({"name": name, "random": before.as_plain() if drew else None})

    def as_plain(self) -> dict[str, Any]:
        """Return what :meth:`continue_from` needs, as plain values and arrays."""
        state = self._dataset.get_state() if self._has_state else None
        return {"calls": list(self._made), "state": state}

    def continue_from(self, kept: dict[str, Any]) -> None:
        """Begin the next epoch as the one that :meth:`as_plain` was called in."""
        self._kept = kept


class ContinuableAdapter(OpenEndedAdapter):
    """A data adapter of Keras whose passes can be gone on with in another process.

    A subclass makes its passes by :attr:`_passes`, and begins the next one by :attr:`_kept` where there is any. It sets
    :attr:`_takes_target` if each batch has ``target_batch`` samples, the last of a pass apart.
    """

    _passes: Passes
    _calls: EpochCalls
    _kept: dict[str, Any] | None = None
    _noted: NotedBatches | None = None
    _parts: tuple[Any, Any, Any]
    _takes_target: bool
    _dataset: Dataset
    _inner: Any
    target_batch: int

    @property
    def loader(self) -> Any:
        """The user's data, as given for ``x``."""
        return self._parts[0]

    @property
    def states_at_begin(self) -> RandomStates:
        """States of the random generators when the last pass had begun."""
        return self._passes.states_at_begin

    def position(self, taken: int) -> dict[str, Any]:
        """Return the place behind ``taken`` batches of the pass begun last, for :meth:`continue_from`."""
        index = self._noted.place_behind(taken * self.target_batch) if self._noted and self._takes_target else None
        begun = {**self._passes.last(), "index": index}
        return {"taken": taken, "pass": begun, "epochs": self._calls.as_plain()}

    def continue_from(self, position: dict[str, Any]) -> None:
        """Let the next pass go on behind the batches that an earlier process had taken, with the same order."""
        self._kept = position
        self._calls.continue_from(position["epochs"])

    @abc.abstractmethod
    def _has_begun(self) -> bool:
        """Return True if the data themselves were looked at, so that the first pass begins with what was seen."""

    @abc.abstractmethod
    def _forget_look(self) -> None:
        """Forget what was seen of the data."""

    @abc.abstractmethod
    def _start(self) -> Iterator[Any]:
        """Start a pass."""

    def _continued(self, position: dict[str, Any]) -> Iterator[Any]:
        """Return the rest of the pass that an earlier process was in."""
        taken, kept = position["taken"], position["pass"]
        has_begun = self._has_begun()
        if has_begun and kept["number"] == 1 and kept["iterator"] is None:
            return _behind(iter(self), taken)
        if has_begun and self._passes.fills_cache:
            _behind(iter(self), None)  # the pass that was begun is the first one, which fills the cache
        self._forget_look()
        self._passes.continue_with(kept, self._dataset)
        if self._noted is not None and kept["index"] is not None:
            self._noted.continue_from(kept["index"], kept["random"])
            return self._start()
        if isinstance(self._inner, arrays.MappedArrays):
            dataset = self._passes.remade(functools.partial(self._inner.get_tf_dataset, taken))
            return self._passes.begin(economy.slices_ahead(dataset)[0])
        return _behind(self._start(), 0 if kept["iterator"] is not None else taken)

    def on_epoch_begin(self) -> None:
        self._calls.begin()

    def on_epoch_end(self) -> None:
        self._calls.end()


def _behind(iterator: Iterator[Any], taken: int | None) -> Iterator[Any]:
    """Return an iterator that has gone through so many batches; None goes through all."""
    collections.deque(itertools.islice(iterator, taken), maxlen=0)
    return iterator


def noted_batches(adapter: Any, target_batch: int) -> NotedBatches | None:
    """Return the batches of a loader whose passes can be gone on with at one of them; None for other data."""
    if data_adapters.reads_by_index(adapter):
        return IndexedBatches(adapter)
    iterators = iterators_of(adapter)
    return None if iterators is None else StatefulBatches(adapter, iterators, target_batch)
