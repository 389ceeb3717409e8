"""Restoration of the model attributes that the user's code changes while it is traced but not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from autobatch.seams import models
from autobatch.types import Model

_NUMBERS = (int, float, str, bytes, type(None))


@contextlib.contextmanager
def attributes_kept(model: Model) -> Iterator[list[str]]:
    """Put back the numbers, lists, dictionaries and sets that a model, its layers and metrics hold, when this ends.

    A trace leaves tensors without a value in them. The yielded list is empty at first; at the end it gets the names of
    the numbers that were changed.
    """
    holders = [model, *models.layers_of(model), *getattr(model, "metrics", ())]
    before = [(holder, dict(vars(holder))) for holder in {id(each): each for each in holders}.values()]
    contents = {
        id(value): (value, value.copy())
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, (list, dict, set))
    }
    changed: list[str] = []
    try:
        yield changed
    finally:
        for holder, attributes in before:
            now = vars(holder)
            for name in [name for name, value in now.items() if isinstance(value, _NUMBERS)]:
                known = attributes.get(name)
                if isinstance(now[name], (int, float)) and not isinstance(now[name], bool) and now[name] != known:
                    changed.append(name)
                    if name not in attributes:
                        del now[name]
            now.update((name, value) for name, value in attributes.items() if isinstance(value, _NUMBERS))
        for value, content in contents.values():
            if _is_same(value, content):
                continue
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)


def _is_same(value: Any, content: Any) -> bool:
    """Return True if a list, dictionary or set still holds the very objects that were in it."""
    if isinstance(value, dict):
        value, content = value.items(), content.items()
    if len(value) != len(content):
        return False
    if isinstance(content, set):
        return bool(value == content)
    return all(_is_one(one, other) for one, other in zip(value, content, strict=True))


def _is_one(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one is other
