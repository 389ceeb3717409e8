"""Batches of a loader whose iterator tells its state, as Grain's and torchdata's do: a pass is gone on with from it."""

from __future__ import annotations

import collections
import copy
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from autobatch.data.noted_batches import NotedBatches
from autobatch.data.random_states import RandomStates
from autobatch.seams import data_adapters, tf_data

logger = logging.getLogger(__name__)

_REACH = 8
"""Effective batches for which states are held: far more than are made before they are trained on."""


class Iterators(Protocol):
    """Iterators of a loader, and their states."""

    def begin(self, make: Callable[[], Iterable[Any]], state: Any) -> Iterator[Any]:
        """Return an iterator of the batches that ``make`` makes, behind those that ``state`` tells of, if any."""

    def state_of(self, iterator: Iterator[Any]) -> Any:
        """Return the state of an iterator that :meth:`begin` has returned."""


class _GrainIterators:
    def begin(self, make: Callable[[], Iterable[Any]], state: Any) -> Iterator[Any]:
        iterator: Any = iter(make())
        if state is not None:
            iterator.set_state(state)
        return iterator  # type: ignore[no-any-return]

    def state_of(self, iterator: Any) -> Any:
        return iterator.get_state()


class _StatefulLoader:
    """A loader with ``state_dict`` and ``load_state_dict``, as ``torchdata.stateful_dataloader`` has one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def begin(self, make: Callable[[], Iterable[Any]], state: Any) -> Iterator[Any]:
        if state is not None:
            self._loader.load_state_dict(state)
        return iter(make())

    def state_of(self, _: Iterator[Any]) -> Any:
        return self._loader.state_dict()


def iterators_of(adapter: Any) -> Iterators | None:
    """Return the iterators of the data behind Keras's ``adapter``; None if these tell no state."""
    if data_adapters.is_grain_adapter(adapter):
        return _GrainIterators()
    loader = data_adapters.torch_loader_of(adapter)
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return _StatefulLoader(loader)
    return None


class StatefulBatches(NotedBatches):
    """Batches of the loader behind Keras's ``adapter``, which become effective batches of ``target_batch``."""

    def __init__(self, adapter: Any, iterators: Iterators, target_batch: int) -> None:
        super().__init__(adapter)
        self._iterators = iterators
        self._reach_rows = _REACH * target_batch
        self._states: dict[int, Any] = {}
        """States behind so many batches of the present pass, those of an earlier process among them."""

    def dataset(self) -> Any:
        """Return the ``tf.data.Dataset`` that Keras's adapter makes of these batches."""
        with tf_data.generators_made_by(self._generate):
            return super().dataset()

    def place_behind(self, rows: int) -> dict[str, Any] | None:
        """Return the place as :class:`NotedBatches` does; None too if the iterator's state cannot be kept."""
        place = super().place_behind(rows)
        if place is None or place["batches"] not in self._states:
            return None
        try:
            return {**place, "own": as_plain(self._states[place["batches"]])}
        except TypeError:
            return None

    def _generate(self, make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        kept = self._begin()
        self._states = {}
        if kept is None:
            yield from self._noted(self._followed(self._iterators.begin(make, None)))
            return
        batches = self._followed(self._behind(make, kept["batches"], from_plain(kept["own"])))
        if kept["random"] is not None:
            RandomStates.from_plain(kept["random"]).restore()
        yield from self._noted(batches, kept["rows"])

    def _behind(self, make: Callable[[], Iterable[Any]], batches: int, state: Any) -> Iterator[Any]:
        """Return an iterator behind so many batches, by its state, or by reading them if it does not take that."""
        self._states[batches] = state
        try:
            return self._iterators.begin(make, state)
        except (KeyError, TypeError, ValueError) as error:
            # Grain's loader compares what its source prints as, which may be an address.
            logger.info("what was seen is read again, since the loader does not take its state: %s", error)
        iterator = self._iterators.begin(make, None)
        collections.deque(itertools.islice(iterator, batches), maxlen=0)
        return iterator

    def _followed(self, iterator: Iterator[Any]) -> Iterator[Any]:
        present, states = self._present, self._states
        for batch in iterator:
            made = present.behind + len(present.rows) + 1
            states[made] = copy.deepcopy(self._iterators.state_of(iterator))
            rows = present.rows[-1] if present.rows else 1
            states.pop(made - 2 - self._reach_rows // max(1, rows), None)
            yield batch


def as_plain(state: Any) -> Any:
    """Return a state of nested containers as lists of plain values and arrays, each behind the name of its kind.

    Raises:
        TypeError: something in it is none of what :func:`from_plain` can make again.
    """
    torch: Any = sys.modules.get("torch")
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if isinstance(state, bytes):
        return ["bytes", np.frombuffer(state, np.uint8)]
    if torch is not None and isinstance(state, torch.Tensor):
        return ["tensor", state.numpy()]
    if isinstance(state, (np.ndarray, np.generic)) and state.dtype.kind in "biuf":
        return ["array", state]
    if type(state) in (list, tuple):
        return [type(state).__name__, [as_plain(part) for part in state]]
    if type(state) is dict:
        return ["dict", [[as_plain(key), as_plain(value)] for key, value in state.items()]]
    raise TypeError(f"a state of this kind cannot be kept: {type(state).__name__}")


def from_plain(plain: Any) -> Any:
    """Return the state of which :func:`as_plain` made ``plain``, in this process or another."""
    if not isinstance(plain, list):
        return plain
    kind, value = plain
    if kind == "bytes":
        return np.asarray(value, np.uint8).tobytes()
    if kind == "tensor":
        return sys.modules["torch"].from_numpy(np.array(value))
    if kind == "array":
        return value
    if kind == "dict":
        return {from_plain(key): from_plain(part) for key, part in value}
    return (tuple if kind == "tuple" else list)(from_plain(part) for part in value)
