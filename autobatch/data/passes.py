"""Passes over one data set, counted, with what decides the order of each, so that one can be gone on with later.

A pass begins with ``iter(dataset)``, which draws from the seeds of the dataset's shuffles. What Python's code draws
while it makes data comes from the global random generators, and what a function in a dataset draws may come from
variables. So the number of a pass, and the states of these generators and variables at its beginning, tell its order.
An array's shuffle without any seed gets a seed for each pass from here. A ``cache()`` behind random numbers holds those
of the first pass, which is then made again as well.
"""

from __future__ import annotations

import collections
import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from autobatch.data import iterator_state
from autobatch.data.effective_iterator import EffectiveIterator, handed_over
from autobatch.data.random_states import RandomStates
from autobatch.errors import warn
from autobatch.seams import random_states, tf_data
from autobatch.types import Dataset


class Passes:
    """Passes over the data of one training.

    Args:
        loader: the user's data, whose own random generators count.
        keeps_order: True if a pass may have to be gone on with in another process.
        gives_seeds: True if the data are arrays that are shuffled without a seed of the user's.
    """

    def __init__(self, loader: Any, *, keeps_order: bool, gives_seeds: bool) -> None:
        self._loader = loader
        self._keeps_order = keeps_order
        self._seed: Any = None
        if keeps_order and gives_seeds:
            with tf.device("CPU:0"):
                self._seed = tf.Variable(_new_seed(), dtype=tf.int64, trainable=False, name="autobatch_order")
        self._before: RandomStates | None = None
        self._after: RandomStates | None = None
        self._number = 0
        self._read = 0  # passes of which something was read
        self._read_before = 0  # the last one
        self._last: dict[str, Any] = {}
        self._first: dict[str, Any] | None = None
        self._variables: list[Any] = []
        self.fills_cache = False
        """True if a cache in memory holds what the first pass has drawn."""
        self.states_at_begin = RandomStates(loader)
        """States of the random generators when the last pass began; those of now before the first."""
        self._next: dict[str, Any] | None = None
        self._unseeded: list[str] = []
        self._saved: Any = None
        self._waiting: list[weakref.ref[EffectiveIterator]] = []

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Enclose the making of Keras's adapter and its dataset; the random numbers that it draws are put back.

        Keras reads the first batches of PyDatasets and torch loaders to learn their structure.
        """
        self._before = RandomStates(self._loader)
        with self._seeded():
            yield
        self._after = RandomStates(self._loader)
        self._before.restore()

    def _seeded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._seed is None else random_states.shuffles_seeded_by(self._seed)

    def remade(self, make: Callable[[], Any]) -> Any:
        """Return a dataset that ``make`` makes over the same data, with the same order."""
        with self._seeded():
            return make()

    def begin(self, dataset: Dataset, *, behind_unread: bool = False, reads_ahead: bool = False) -> Iterator[Any]:
        """Begin the next pass; ``behind_unread`` if Keras would begin another before it, which nobody reads.

        ``reads_ahead`` if more is read of it than is handed on, so that its state does not tell the place.
        """
        if self._next is not None:
            self._restore(self._next)
        elif self._before is not None and self._after is not None:
            # Use up the random numbers that Keras's own fit would have used, unless somebody set a seed since.
            self._after.replay(self._before, self._loader)
        self._before = self._after = None
        if behind_unread and self._next is None:
            self._draw(dataset)
        self._number += 1
        kept, self._next = self._next, None
        if not self._keeps_order:
            return iter(dataset)
        self._read_before = self._read
        return self._noted(self._begin_kept(dataset, kept, reads_ahead))

    def _noted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for element in iterator:
            self._read = self._read_before + 1
            yield element

    def _begin_kept(self, dataset: Dataset, kept: dict[str, Any] | None, reads_ahead: bool) -> Iterator[Any]:
        seed = None if self._seed is None else _new_seed() if kept is None else kept["seed"]
        self.states_at_begin = RandomStates(self._loader)
        self._saved = None
        self._last = {"number": self._number, **self._states_now(), "seed": seed}
        if self.fills_cache and self._number == 1:
            self._first = self._states_now()
        if self._unseeded:
            return self._begin_unseeded(dataset, None if kept is None else kept["iterator"], reads_ahead)
        if seed is None:
            return iter(dataset)
        self._seed.assign(seed)
        iterator = iter(dataset)
        return handed_over([next(iterator)], iterator)  # the order is drawn now, before the seed is another

    def save_iterators_of(self, dataset: Dataset) -> None:
        """Keep what decides the order of ``dataset``: the iterator's state too, if it is drawn without a seed."""
        if self._keeps_order:
            self._unseeded = tf_data.draws_without_seed(dataset)
            self._variables = tf_data.variables_in(dataset)
            self.fills_cache = tf_data.caches_what_is_drawn(dataset)

    def _states_now(self) -> dict[str, Any]:
        drawn = [variable.numpy() for variable in self._variables]
        return {"random": RandomStates(self._loader).as_plain(), "variables": drawn}

    def _restore(self, states: dict[str, Any]) -> None:
        RandomStates.from_plain(states["random"], self._loader).restore()
        for variable, value in zip(self._variables, states.get("variables", ()), strict=False):
            if variable.shape.is_compatible_with(value.shape):
                variable.assign(value)

    def _begin_unseeded(self, dataset: Dataset, state: dict[str, Any] | None, reads_ahead: bool) -> Iterator[Any]:
        iterator: Iterator[Any] = iter(dataset)
        if reads_ahead:
            self._warn_of_lost_order()
            return iterator
        if state is not None:
            iterator_state.restore_iterator(iterator, state)
        self._saved = iterator
        self.last()
        return iterator

    def _draw(self, dataset: Dataset) -> None:
        iter(dataset)
        self._number += 1

    def in_order(self, start: Callable[[], Iterator[Any]]) -> EffectiveIterator:
        """Return a pass that ``start`` begins when it is read, and earlier ones before it: each draws from the seeds.

        At the end of an epoch Keras makes a pass that it never reads.
        """

        def begin(iterator: EffectiveIterator) -> Iterator[Any]:
            while any(waiting() is iterator for waiting in self._waiting):
                earliest = self._waiting.pop(0)()
                if earliest is None:
                    start()  # nobody will read it
                elif earliest is not iterator:
                    earliest.begin()
            return start()

        later = EffectiveIterator(begin)
        self._waiting.append(weakref.ref(later))
        return later

    # -- going on in another process ----------------------------------------------------------------------------------

    def last(self) -> dict[str, Any]:
        """Return what tells the order of the pass that was begun last, as plain values and arrays.

        ``iterator`` among it is the state of its iterator, its place included; None where seeds tell the order.
        """
        state = None if self._saved is None else iterator_state.state_of(self._saved)
        if self._saved is not None and state is None:
            self._warn_of_lost_order()
        return {**self._last, "iterator": state, "first": self._first, "read_before": self._read_before}

    def _warn_of_lost_order(self) -> None:
        warn(
            f"This dataset draws random numbers without a seed ({', '.join(self._unseeded)}), and its state cannot be "
            "saved. So a restart cannot find its order again: of the epoch under way some samples may then be seen "
            "twice and others not. Give shuffle a seed, or call keras.utils.set_random_seed before the dataset is made."
        )
        self._unseeded, self._saved = [], None

    def continue_with(self, kept: dict[str, Any], dataset: Dataset) -> None:
        """Let the next pass that begins be the one that ``kept`` tells of, in this process or another."""
        first = kept.get("first")
        if self.fills_cache and first is not None and not self._number and kept["number"] > 1:
            self._restore(first)
            self._number = self._read = 1
            collections.deque(iter(dataset), maxlen=0)
        self._first = self._first or first
        while self._number < kept["number"] - 1:
            self._draw(dataset)
        while self._read < kept.get("read_before", 0):
            tf_data.draw_as_if_read(dataset)
            self._read += 1
        self._next = kept


def _new_seed() -> int:
    return int.from_bytes(os.urandom(7), "little")
