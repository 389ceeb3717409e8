"""Passes over effective batches, as Keras asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from autobatch.seams.data_adapters import DataAdapter


def handed_over(first: list[Any], rest: Iterable[Any] = ()) -> Iterator[Any]:
    """Yield the elements of ``first``, which is emptied, then those of ``rest``: none is held once it has been given.

    ``itertools.chain`` holds its first part until the second has ended.
    """
    while first:
        yield first.pop(0)
    yield from rest


class EffectiveIterator(Iterator[Any]):
    """One pass over effective batches; its type distinguishes it from data that a callback hands to the model.

    The pass may begin only when its first batch is asked for: at the end of an epoch Keras makes a pass that it never
    reads. :attr:`taken` are the batches that it has given, ``behind`` those of the same pass in an earlier process.
    """

    def __init__(self, begin: Callable[[EffectiveIterator], Iterator[Any]], *, behind: int = 0) -> None:
        self._begin = begin
        self._iterator: Iterator[Any] | None = None
        self.taken = behind

    def begin(self) -> Iterator[Any]:
        """Begin the pass, if it has not begun."""
        if self._iterator is None:
            self._iterator = self._begin(self)
        return self._iterator

    def __next__(self) -> Any:
        batch = next(self.begin())
        self.taken += 1
        return batch


class OpenEndedAdapter(DataAdapter):  # type: ignore[misc]
    """A data adapter of Keras whose last batch may have any size."""

    @property
    def has_partial_batch(self) -> bool | None:
        return None

    @property
    def partial_batch_size(self) -> int | None:
        return None
