"""Tells how a loss, or another number of a batch, is made of sums over samples."""

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
"""A sum of more numbers than this, as of a matrix of all features by all, is not counted beforehand."""


@dataclass(slots=True)
class Part:
    """One of the sums that a number of the batch is a function of."""

    tensor: Tensor
    dependence: Dependence
    count: Any = None
    """For a mean over samples picked by their data, how many were picked here; None for a sum of known degree."""

    @property
    def trained(self) -> bool:
        return self.dependence.weights and bool(self.tensor.dtype.is_floating)


@dataclass(slots=True)
class Terms:
    """How a tensor is made: of one ``degree``, or else as a function of ``sums``."""

    degree: Any = None
    sums: list[Part] = field(default_factory=list)
    target: Any = None
    """The tensor as a function of ``sums``."""
    leaves: list[Tensor] = field(default_factory=list)
    """Tensors with an entry for each sample, of which some of ``sums`` were made anew, unknown to any tape."""


class Maker:
    """Tells it of the tensors of one trace. ``note`` is told what each that was looked at depends on."""

    def __init__(self, flow: SampleFlow, note: Callable[[Dependence], None]) -> None:
        self.flow = flow
        self._note = note

    def of(self, target: Any, *, silently: bool = False) -> Terms | None:
        """How ``target`` is made; None where that cannot be told. It is noted, but ``silently``."""
        note = self._note
        if silently:
            self._note = lambda found: None
        try:
            return self._noted_terms(target)
        finally:
            self._note = note

    def _noted_terms(self, target: Any) -> Terms | None:
        found = self.flow.of(target)
        if found.unknown:
            self._note(found)
            return None
        if found.axis is not None:  # differentiated, a vector is a sum
            if found.degree is not None and found.linear and not found.mixed:
                self._note(found)
                return Terms(degree=found.degree + 1)
            terms = self._as_sums(tf.reduce_sum(target))
        elif found.degree is not None and (found.linear or not found.data) and not found.mixed:
            self._note(found)
            return Terms(degree=found.degree)
        else:
            terms = self._as_sums(target)
        if isinstance(terms, Terms):
            return terms
        # Of a sum of samples that depend on each other the degree is right all the same.
        if found.degree is not None and found.linear:
            self._note(found)
            return Terms(degree=found.degree + (found.axis is not None))
        self._note(unknown(terms))
        return None

    def _as_sums(self, target: Any) -> Terms | str:
        """``target`` as a function of sums; or the name of an operation of which that is not known."""
        rewritten, leaves = as_plain_sums(target, self.flow)
        sums, lost = self._sums_of(rewritten)
        return lost or Terms(sums=sums, target=rewritten, leaves=leaves)

    def _sums_of(self, target: Any) -> tuple[list[Part], str]:
        """The sums that ``target`` is a function of; or the name of an operation of which that is not known."""
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
