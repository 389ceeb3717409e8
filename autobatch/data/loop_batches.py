"""Batches that the user's own training loop passes, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.data import layouts
from autobatch.errors import warn
from autobatch.records import HostUse
from autobatch.seams.versions import leaves_with_paths
from autobatch.tensors.batch_structure import Structure, is_missing, rows_of
from autobatch.types import Batch, ElementSpec


class OneBatch:
    """A single effective batch, as data for a search whose batches have ``at_least`` samples or as many as this one.

    ``cannot_be_cut`` is a reason to take it whole. The search counts portions, as
    :class:`autobatch.data.effective_batches.EffectiveBatches` does: ``target_batch`` is ``at_least`` in portions.
    """

    def __init__(self, data: Batch, *, at_least: int, cannot_be_cut: str = "") -> None:
        self._data = data
        self.has_elements = True
        spec = element_spec_of(data)
        layout = layouts.layout_of_elements([data], ended=False, streams=False, element_spec=spec, alone=True)
        if cannot_be_cut:
            layout = layouts.Layout(None, tuple(rows_of(data)), cannot_be_cut)
        if layout is not None:
            layout = layout.for_target(at_least)
        self.element_spec = spec if layout is None else layout.spec(spec)
        self.structure = Structure(self.element_spec)
        self.target_batch = at_least if layout is None else layout.portions(at_least)
        if layout is not None and layout.portion is None:
            warn(layout.sentence(at_least))
        self.sample_limit = max(self.structure.count(data), self.target_batch)

    @property
    def samples_in_each(self) -> int | None:
        """None: the batches to come may have any size."""
        return None

    def host_uses(self) -> tuple[HostUse, ...]:
        """Return nothing: the pipeline is the user's own loop."""
        return ()

    def bytes_to_come(self, samples: int) -> int:
        """Return 0: the batches to come are made by the user's own loop."""
        return 0

    def look(self) -> Any:
        """Return the batch."""
        return self._data


def element_spec_of(data: Batch) -> Any:
    """Return the type specs of a batch of tensors or arrays."""
    return tf.nest.map_structure(_spec_of, data)


def _spec_of(part: Any) -> Any:
    if part is None:
        return None
    if isinstance(part, np.ndarray):
        return tf.TensorSpec(part.shape, tf.as_dtype(part.dtype))  # a tensor would be a copy
    is_composite = isinstance(part, (tf.RaggedTensor, tf.SparseTensor))
    return tf.type_spec_from_value(part if is_composite else tf.convert_to_tensor(part))


def _parts(nest: Any) -> dict[tuple[Any, ...], Any]:
    """Return the parts of a batch, or their type specs, by their paths in it; a missing part is None."""
    return {path: None if is_missing(part) else part for path, part in leaves_with_paths(nest)}


def _written(path: tuple[Any, ...]) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)


def _described(spec: Any) -> str:
    if spec is None:
        return "None"
    kind = type(spec).__name__.removesuffix("Spec")
    return f"a {kind} of dtype {spec.dtype.name} and shape {tuple(spec.shape) if spec.shape.rank is not None else '?'}"


def require_alike(element_spec: ElementSpec, batch: Batch) -> None:
    """Refuse a batch that a step made for batches of ``element_spec`` cannot take; its size may differ.

    Raises:
        TypeError: a part has another dtype, or is of another kind, for example sparse instead of dense.
        ValueError: a part is missing or new, or has another number of dimensions.
    """
    remedy = "Let all batches be alike, or call autobatch.wrap_step once for each kind."
    known, received = _parts(element_spec), _parts(element_spec_of(batch))
    if known.keys() != received.keys():
        names = [", ".join(map(_written, parts)) or "nothing" for parts in (known, received)]
        raise ValueError(
            f"The first batch had the parts {names[0]}; this one has others. {remedy} Received: {names[1]}"
        )
    for path, spec in known.items():
        part = received[path]
        name, was = _written(path), f"was {_described(spec)} in the first batch"
        if (spec is None) != (part is None) or type(spec) is not type(part):
            raise TypeError(f"{name} {was}. {remedy} Received: {_described(part)}")
        if spec is None:
            continue
        if spec.dtype != part.dtype:
            raise TypeError(
                f"{name} {was}. Give every batch the same dtype: tf.cast({name}, {spec.dtype.name!r}), or "
                f".astype({spec.dtype.name!r}) of an array. Received: {_described(part)}"
            )
        if None not in (spec.shape.rank, part.shape.rank) and spec.shape.rank != part.shape.rank:
            raise ValueError(f"{name} {was}. {remedy} Received: {_described(part)}")


def widened(element_spec: ElementSpec, batch: Batch) -> Any:
    """Return ``element_spec`` with every dimension left open in which ``batch`` differs.

    It is the same object if no dimension differs. Samples padded to the longest of each batch differ in length from
    batch to batch.
    """
    differs = False

    def widen(spec: Any, part: Any) -> Any:
        nonlocal differs
        if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
            return spec
        sizes = tuple(np.shape(part))
        known = spec.shape.as_list()
        kept = [None if size != was else was for was, size in zip(known[1:], sizes[1:], strict=True)]
        differs = differs or kept != known[1:]
        return tf.TensorSpec([known[0], *kept], spec.dtype)

    wider = tf.nest.map_structure(widen, element_spec, batch, check_types=False)
    return wider if differs else element_spec
