"""States of random generators, kept while data are looked at, and put back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

# -- the random numbers of Python code that makes data ----------------------------------------------------------------


class RandomStates:
    """States of the global random generators that Python code draws from while it makes data.

    These are Python's and NumPy's. If torch is loaded, they include torch's, and the generators that a torch ``loader``
    was given.
    """

    def __init__(self, loader: Any = None) -> None:
        torch: Any = sys.modules.get("torch")
        self._torch = None if torch is None else torch.get_rng_state()
        self._generators: list[Any] = []
        for owner in (loader, getattr(loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if torch is not None and isinstance(generator, torch.Generator):
                self._generators.append(generator)
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=True)
        self._own = [generator.get_state() for generator in self._generators]

    def _parts(self) -> list[tuple[Any, Any]]:
        torch: Any = sys.modules.get("torch")
        parts: list[tuple[Any, Any]] = [(random.setstate, self._python), (np.random.set_state, self._numpy)]
        if self._torch is not None:
            parts.append((torch.set_rng_state, self._torch))
        parts += [(generator.set_state, state) for generator, state in zip(self._generators, self._own, strict=True)]
        return parts

    def restore(self) -> None:
        """Set every generator back to its kept state."""
        for set_state, state in self._parts():
            set_state(state)

    def replay(self, before: RandomStates, loader: Any = None) -> None:
        """Set to these states every generator that is still in its state ``before``: nobody has drawn from it."""
        now = RandomStates(loader)
        for (set_state, state), (_, earlier), (_, current) in zip(
            self._parts(), before._parts(), now._parts(), strict=False
        ):
            if _same_state(earlier, current):
                set_state(state)


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(_same_state(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


@contextlib.contextmanager
def random_states_kept(loader: Any = None) -> Iterator[None]:
    """Put the generators back to their states at the end, whatever the enclosed code draws."""
    states = RandomStates(loader)
    try:
        yield
    finally:
        states.restore()
