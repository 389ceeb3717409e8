"""Composition of a loss, or of another number of a batch: the sums over samples that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from autobatch.graphs.dependence import Dependence, unknown
from autobatch.graphs.sample_flow import SampleFlow
from autobatch.losses.linear_forms import as_plain_sums
from autobatch.types import Tensor

MOST_NUMBERS = 2**20
"""Most numbers in a sum that is counted beforehand; a matrix of all features by all features may have more."""


@dataclass(slots=True)
class Part:
    """One of the sums that a number of the batch is made of."""

    tensor: Tensor
    dependence: Dependence
    count: Any = None
    """Number of samples picked here, for a mean over samples picked by their data; None for a sum of known degree."""

    @property
    def trained(self) -> bool:
        return self.dependence.weights and bool(self.tensor.dtype.is_floating)


@dataclass(slots=True)
class Composition:
    """Makeup of a tensor: it is of one ``degree``, or else a function of ``sums``."""

    degree: Any = None
    sums: list[Part] = field(default_factory=list)
    target: Any = None
    """The tensor as a function of ``sums``."""
    leaves: list[Tensor] = field(default_factory=list)
    """Tensors with an entry for each sample, from which some of ``sums`` were made anew, unknown to any tape."""


class Maker:
    """Maker of the terms of one trace's tensors. ``note`` is called with the dependence of each tensor looked at."""

    def __init__(self, flow: SampleFlow, note: Callable[[Dependence], None]) -> None:
        self.flow = flow
        self._note = note

    def of(self, target: Any, *, silently: bool = False) -> Composition | None:
        """Return the terms of ``target``; None where they are unknown. Its dependence is noted, unless ``silently``."""
        note = self._note
        if silently:
            self._note = lambda found: None
        try:
            return self._noted_terms(target)
        finally:
            self._note = note

    def _noted_terms(self, target: Any) -> Composition | None:
        found = self.flow.of(target)
        if found.unknown:
            self._note(found)
            return None
        if found.axis is not None:  # differentiated, a vector is a sum
            if found.degree is not None and found.linear and not found.mixed:
                self._note(found)
                return Composition(degree=found.degree + 1)
            terms = self._as_sums(tf.reduce_sum(target))
        elif found.degree is not None and (found.linear or not found.data) and not found.mixed:
            self._note(found)
            return Composition(degree=found.degree)
        else:
            terms = self._as_sums(target)
        if isinstance(terms, Composition):
            return terms
        # The degree of a sum is right even if its samples depend on each other.
        if found.degree is not None and found.linear:
            self._note(found)
            return Composition(degree=found.degree + (found.axis is not None))
        self._note(unknown(terms))
        return None

    def _as_sums(self, target: Any) -> Composition | str:
        """Return ``target`` as a function of sums; or the name of the operation that prevents it."""
        rewritten, leaves = as_plain_sums(target, self.flow)
        sums, lost = self._sums_of(rewritten)
        return lost or Composition(sums=sums, target=rewritten, leaves=leaves)

    def _sums_of(self, target: Any) -> tuple[list[Part], str]:
        """Return the sums that make up ``target``; or none, and the name of the operation that prevents it."""
        sums: list[Part] = []
        pending: list[tuple[Any, str]] = [(target, target.op.name)]
        seen: set[str] = set()
        while pending:
            tensor, used_by = pending.pop()
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            found = self.flow.of(tensor)
            if found.unknown:
                return [], found.unknown
            if found.axis is not None:
                return [], used_by
            if not found.data and found.degree == 0 and not found.weights:
                continue
            if found.is_plain_sum and found.mixed:
                return [], next(iter(sorted(found.mixed)))
            if found.is_plain_sum:
                if not _can_be_counted(tensor):
                    return [], tensor.op.name
                sums.append(Part(tensor, found))
                continue
            inputs = list(tensor.op.inputs)
            if tensor.op.type == "Mean" and self.flow.of(inputs[0]).selected:
                if not _can_be_counted(tensor):
                    return [], tensor.op.name
                picked = tf.cast(tf.size(inputs[0]), tf.float64) / max(tensor.shape.num_elements(), 1)
                sums.append(Part(tensor, Dependence(data=True, weights=found.weights), picked))
                continue
            if not inputs or any(each.dtype == tf.resource for each in inputs):
                return [], tensor.op.name
            pending += [(each, tensor.op.name) for each in inputs]
        return sums, ""


def _can_be_counted(tensor: Tensor) -> bool:
    numbers = tensor.shape.num_elements()
    return numbers is not None and numbers <= MOST_NUMBERS
