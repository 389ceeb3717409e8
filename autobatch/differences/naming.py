"""Names by which a user knows the layers, optimizers and variables of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras

from autobatch.types import Layer, Model, Optimizer

MOST_NAMES = 3
"""Most layers of one class, and most classes, that a sentence names; it counts the others."""


def named(layers: Iterable[Layer]) -> str:
    """Return layers by class and name: ``Dropout (a, b) and RandomFlip (c)``."""
    return named_pairs([(type(layer).__name__, layer.name) for layer in layers])


def named_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """Return layers, given as pairs of class and name, as text: ``Dropout (a, b) and RandomFlip (c)``."""
    by_class: dict[str, list[str]] = {}
    for kind, name in pairs:
        by_class.setdefault(kind, []).append(name)
    parts = [f"{kind} ({_some(names)})" for kind, names in list(by_class.items())[:MOST_NAMES]]
    left = sum(len(names) for names in list(by_class.values())[MOST_NAMES:])
    return listed([*parts, f"{left} more {'layer' if left == 1 else 'layers'}"] if left else parts)


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return f"{', '.join(names[:MOST_NAMES])}{f' and {more} more' if more > 0 else ''}"


def listed(names: Sequence[str]) -> str:
    """Return names joined for a sentence: ``a, b and c``."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def optimizer_name(model: Model, optimizer: Optimizer) -> str:
    """Return the attribute of the model that holds an optimizer; the optimizer's own name if none does.

    A loop's own optimizers have no such attribute.
    """
    if not isinstance(model, keras.Model):
        return str(optimizer.name)
    for attribute, value in vars(model).items():
        if attribute.startswith("_"):
            continue
        if value is optimizer:
            return str(attribute)
        parts = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        for key, part in parts:
            if part is optimizer:
                return f"{attribute}[{key!r}]"
    return str(optimizer.name)


def the_optimizer(model: Model, optimizer: Optimizer) -> str:
    """Return an optimizer as the subject of a sentence; that of ``compile`` is "the optimizer"."""
    name = optimizer_name(model, optimizer)
    return "the optimizer" if name == "optimizer" else name
