"""Replacement of attributes of Keras and TensorFlow for a while, on one thread or on all of them.

No lock is held while a replacement lasts: threads that replace the same attribute neither wait for each other nor see
each other's replacement. The first replacement puts a function in the attribute's place, which looks up the replacement
for its caller. The end of the last one puts the attribute back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class _Here(threading.local):
    """Key of the calling thread, or of the innermost :func:`suspended` that it is within: an object for each."""

    def __init__(self) -> None:
        self.key = object()


_HERE = _Here()

_CHANGING = threading.RLock()
"""Lock that is held while a replacement is noted or struck off, and never around other code."""

_PLACES: dict[tuple[int, str], _Place] = {}
"""Places of all attributes that are replaced now, by the owner's id and the attribute's name."""

_ABSENT = object()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Set aside what was replaced on this thread before, while the context is open; what is replaced within it holds.

    A metric that is updated for the whole batch must find Keras as it is.
    """
    before, _HERE.key = _HERE.key, object()
    try:
        yield
    finally:
        _HERE.key = before


@contextlib.contextmanager
def replaced(
    owner: Any, name: str, make: Callable[[Any], Callable[..., Any]], *, on_every_thread: bool = False
) -> Iterator[None]:
    """Replace the function ``owner.name`` by ``make(original)`` for the calling thread, while the context is open.

    ``original`` is what the thread would have called without it: its replacement before this one, or the attribute as
    it was found. ``owner`` is a class, an instance, a module, or a closure's cell, whose ``cell_contents`` is replaced.
    If the attribute is a property, its getter is replaced.

    Under a strategy each replica is traced on a thread of its own, and a replacement made there holds there alone.
    ``on_every_thread`` replaces for all threads, :func:`suspended` or not. A value that somebody else puts in the
    attribute's place meanwhile stays there.
    """
    replacement = _Replacement(None if on_every_thread else _HERE.key)
    with _CHANGING:
        place = _PLACES.get((id(owner), name))
        if place is None or not place.is_in_place():
            place = _Place(owner, name)
        original = place.original_of(replacement)
        place.replacements = (replacement, *place.replacements)
    try:
        replacement.function = make(original)
        yield
    finally:
        with _CHANGING:
            replacement.function = None
            place.replacements = tuple(each for each in place.replacements if each is not replacement)
            if not place.replacements:
                place.put_back()


@contextlib.contextmanager
def replaced_in_each(
    owners: Iterable[Any], name: str, make: Callable[[Any], Callable[..., Any]], *, on_every_thread: bool = False
) -> Iterator[None]:
    """Replace the attribute of every owner, while the context is open; see :func:`replaced`."""
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(replaced(owner, name, make, on_every_thread=on_every_thread))
        yield


class _Replacement:
    """Function that is called in an attribute's place, with the key of its callers; None stands for every thread."""

    function: Callable[..., Any] | None = None
    """Function to call; None before the replacement begins and after it has ended."""

    def __init__(self, key: object | None) -> None:
        self.key = key


class _Stack:
    """The replacements of an attribute, newest first, and the function below them all."""

    def __init__(self, original: Callable[..., Any], replacements: tuple[_Replacement, ...] = ()) -> None:
        self.original = original
        self.replacements = replacements

    @property
    def function(self) -> Callable[..., Any]:
        """Function for the thread that reads this. AutoGraph converts what is called, but not what is read."""
        for replacement in self.replacements:
            function = replacement.function  # read once: another thread may end what holds on every thread
            if function is not None and (replacement.key is None or replacement.key is _HERE.key):
                return function
        return self.original

    def called(self) -> Callable[..., Any]:
        """Return a function that calls the function for its caller, with one frame between the two."""

        @functools.wraps(self.original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.function(*args, **kwargs)

        return call

    def original_of(self, replacement: _Replacement) -> Callable[..., Any]:
        """Return what calls to ``replacement`` find below it; the original itself if nothing can be between."""
        keys = (None, replacement.key)
        below = tuple(each for each in self.replacements if replacement.key is None or each.key in keys)
        return _Stack(self.original, below).called() if below else self.original


class _Place(_Stack):
    """Attribute that is replaced, from its first replacement to the end of its last."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name
        self._found = _own_value(owner, name)
        attribute = getattr(owner, name) if self._found is _ABSENT else self._found
        is_property = isinstance(attribute, property)
        super().__init__(attribute.fget if is_property else attribute)
        self._instead = attribute.getter(self.called()) if is_property else self.called()
        self._put(self._instead)
        _PLACES[id(owner), name] = self

    def is_in_place(self) -> bool:
        """Return False if somebody else has put another value in the attribute's place."""
        return _own_value(self._owner, self._name) is self._instead

    def put_back(self) -> None:
        """Put the attribute back as it was found, unless it is somebody else's now."""
        if self.is_in_place():
            self._put(self._found)
        if _PLACES.get((id(self._owner), self._name)) is self:
            del _PLACES[id(self._owner), self._name]

    def _put(self, value: Any) -> None:
        if isinstance(self._owner, types.CellType):
            self._owner.cell_contents = value
        elif isinstance(self._owner, type):
            delattr(self._owner, self._name) if value is _ABSENT else setattr(self._owner, self._name, value)
        elif value is _ABSENT:
            del vars(self._owner)[self._name]
        else:
            vars(self._owner)[self._name] = value  # past what Keras's objects do when an attribute is set


def _own_value(owner: Any, name: str) -> Any:
    """Return what ``owner`` itself holds under a name, not what it inherits; :data:`_ABSENT` if it holds nothing."""
    return owner.cell_contents if isinstance(owner, types.CellType) else vars(owner).get(name, _ABSENT)
