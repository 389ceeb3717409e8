"""Log of the sizes that XLA compiles a step for: each shape is compiled by itself, which can take a minute."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from autobatch.types import Model, Tensor

logger = logging.getLogger(__name__)


class Compilations:
    """Sizes for which a model's steps are compiled. Says nothing if XLA does not compile the model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[str, set[Any]] = {}

    def announce(self, step: str, leaves: list[Tensor], sizes: Iterable[int]) -> None:
        """Log each size, in samples, that the ``step`` is about to be compiled for, as it was not run with it yet."""
        if not self._model.jit_compile or self._model.run_eagerly:
            return
        shapes = tuple(tuple(getattr(leaf, "shape", ())[1:]) for leaf in leaves)
        known = self._known.setdefault(step, set())
        for size in dict.fromkeys(sizes):
            if (size, shapes) not in known:
                known.add((size, shapes))
                logger.info("compiling for %d sample%s (%s)", size, "s" if size > 1 else "", step)

    def forget(self, step: str) -> None:
        """Note that the ``step`` is traced anew, so that what it was compiled for is lost."""
        self._known.pop(step, None)
