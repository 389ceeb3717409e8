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

    def as_plain(self) -> dict[str, Any]:
        """Return the states as plain values and arrays, which :meth:`from_plain` takes."""
        return {
            "python": self._python,
            "numpy": self._numpy,
            "torch": None if self._torch is None else self._torch.numpy(),
            "own": [state.numpy() for state in self._own],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], loader: Any = None) -> RandomStates:
        """Return the states that :meth:`as_plain` has returned, in this process or another, for this ``loader``.

        Generators that are here and were not there keep their present states.
        """
        states = cls(loader)
        version, internal, gauss = plain["python"]
        states._python = (version, tuple(internal), gauss)
        name, keys, *rest = plain["numpy"]
        states._numpy = (name, np.asarray(keys, np.uint32), *rest)
        torch: Any = sys.modules.get("torch")
        if torch is not None and states._torch is not None and plain["torch"] is not None:
            states._torch = torch.from_numpy(np.array(plain["torch"]))
        if torch is not None and len(plain["own"]) == len(states._own):
            states._own = [torch.from_numpy(np.array(state)) for state in plain["own"]]
        return states

    def same_as(self, other: RandomStates) -> bool:
        """Return True if nobody has drawn between these states and the ``other`` ones."""
        pairs = zip(self._parts(), other._parts(), strict=False)
        return all(_same_state(mine, theirs) for (_, mine), (_, theirs) in pairs)

    def share(self, other: RandomStates) -> None:
        """Hold the very states of ``other`` that are equal to these, so that they take memory once."""
        for name in ("_python", "_numpy", "_torch"):
            if _same_state(getattr(self, name), getattr(other, name)):
                setattr(self, name, getattr(other, name))

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
    if isinstance(one, tuple) and all(type(part) is int for part in one):
        return bool(one == other)  # Python's generator has 625 numbers
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
