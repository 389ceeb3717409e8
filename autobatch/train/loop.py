"""Accumulation and recovery for a training loop of the user's own, without ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.records import HostUse, Recovery, Report
from autobatch.train import keras_seams
from autobatch.train.recovery import Transaction
from autobatch.train.structure import Structure, is_missing


class LoopModel:
    """What :class:`AccumulatedStep` needs to know of a model, with the user's function as its ``train_step``.

    ``train_step(batch)`` runs forward and backward and calls ``apply`` or ``apply_gradients`` of each optimizer once;
    what it returns is averaged over the micro-batches where it is a scalar, each weighted by its samples.
    """

    compiled = True
    steps_per_execution = 1
    metrics: tuple[Any, ...] = ()

    def __init__(self, train_step: Callable[[Any], Any], model: Any, optimizer: Any, *, jit_compile: bool) -> None:
        self.train_step = train_step
        self.optimizers = require_optimizers(optimizer)
        self.optimizer = self.optimizers[0]
        self.jit_compile = jit_compile
        self.run_eagerly = False
        self.model = model

    @property
    def name(self) -> str:
        return str(getattr(self.model, "name", "model"))

    @property
    def dtype_policy(self) -> Any:
        return getattr(self.model, "dtype_policy", keras.config.dtype_policy())

    @property
    def variables(self) -> list[Any]:
        return list(self.model.variables)

    @property
    def trainable_variables(self) -> list[Any]:
        return list(self.model.trainable_variables)

    def _flatten_layers(self) -> list[Any]:
        return keras_seams.layers_of(self.model)

    @property
    def built(self) -> bool:
        return bool(self.model.built)


def require_optimizers(optimizer: Any) -> tuple[Any, ...]:
    """The optimizers that ``wrap_step`` was given, one or several.

    Raises:
        TypeError: something else is among them.
        ValueError: there is none.
    """
    found = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    if not found:
        raise ValueError(f"optimizer must be the one that train_step calls, or a list of them. Received: {optimizer!r}")
    for each in found:
        if not isinstance(each, keras.optimizers.Optimizer):
            raise TypeError(
                "optimizer must be the keras.optimizers.Optimizer that train_step calls, or a list of several. "
                f"Received: {each!r} (of type {type(each).__name__})"
            )
    return found


class OneBatch:
    """A single effective batch, looked at by a search."""

    def __init__(self, data: Any, samples: int) -> None:
        self._data = data
        self.sample_limit = samples
        self.element_spec = element_spec_of(data)
        self.structure = Structure(self.element_spec)

    def host_uses(self) -> tuple[HostUse, ...]:
        """Nothing: the pipeline is the user's own loop."""
        return ()

    def bytes_to_come(self, samples: int) -> int:
        """0, for the same reason."""
        return 0

    def look(self) -> Any:
        """The batch."""
        return self._data


def element_spec_of(data: Any) -> Any:
    """The type specs of a batch of tensors or arrays."""
    return tf.nest.map_structure(_spec_of, data)


def _spec_of(part: Any) -> Any:
    if part is None:
        return None
    if isinstance(part, np.ndarray):
        return tf.TensorSpec(part.shape, tf.as_dtype(part.dtype))  # without the copy that a tensor is
    is_composite = isinstance(part, (tf.RaggedTensor, tf.SparseTensor))
    return tf.type_spec_from_value(part if is_composite else tf.convert_to_tensor(part))


def _parts(nest: Any) -> dict[tuple[Any, ...], Any]:
    """The parts of a batch, or their type specs, by where they stand in it; a part that is missing is None."""
    return {tuple(path): None if is_missing(part) else part for path, part in keras.tree.flatten_with_path(nest)}


def _written(path: tuple[Any, ...]) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)


def _described(spec: Any) -> str:
    if spec is None:
        return "None"
    kind = type(spec).__name__.removesuffix("Spec")
    return f"a {kind} of dtype {spec.dtype.name} and shape {tuple(spec.shape) if spec.shape.rank is not None else '?'}"


def require_alike(element_spec: Any, batch: Any) -> None:
    """Refuse a batch that the step, made for batches of ``element_spec``, cannot take. Sizes may differ.

    Raises:
        TypeError: a part has another dtype, or is of another kind, as sparse instead of dense.
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


def widened(element_spec: Any, batch: Any) -> Any:
    """``element_spec`` with every dimension left open in which ``batch`` differs; the same object if none does.

    Samples padded to the longest of each batch have another length in each.
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


class WrappedStep:
    """A ``train_step`` that takes effective batches of any size; made by :func:`autobatch.wrap_step`.

    ``report`` is that of the search, None before the first batch; ``recoveries`` lists what happened since.

    Args:
        open_first: Searches on the first batch; returns the transaction for it, its report, and what makes the
            transaction for a wider element spec, given the one before.
        name: What the user's function is called.
        target_batch: The effective batch that the search is made for.
        micro_batch: The size that was given in place of a search.
    """

    def __init__(
        self,
        open_first: Callable[[Any], tuple[Transaction, Report, Callable[[Any, Transaction], Transaction]]],
        *,
        name: str,
        target_batch: int,
        micro_batch: int | None,
    ) -> None:
        self._open_first = open_first
        self._name = name
        self._target_batch = target_batch
        self._micro_batch = micro_batch
        self._open_wider: Callable[[Any, Transaction], Transaction] | None = None
        self._transaction: Transaction | None = None
        self._element_spec: Any = None
        self.report: Report | None = None

    def __repr__(self) -> str:
        """Name the function, its effective batch, and the micro-batch as it is now."""
        if self._transaction is not None:
            size = str(self._transaction.policy.micro_batch)
            count = len(self._transaction.recoveries)
            how = (("searched" if self._micro_batch is None else "given"), *([f"{count} recovered"] if count else []))
        elif self._micro_batch is None:
            size, how = "'auto'", ("not searched yet: the first batch starts it",)
        else:
            size, how = str(self._micro_batch), ("given",)
        return f"<WrappedStep {self._name} target_batch={self._target_batch} micro_batch={size} ({', '.join(how)})>"

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The times that a batch ran out of memory and the loop went on, in turn."""
        return () if self._transaction is None else tuple(self._transaction.recoveries)

    def __call__(self, batch: Any) -> Any:
        """Make one update with an effective batch; return what ``train_step`` returned, for the whole of it."""
        if self._transaction is None or self._open_wider is None:
            self._transaction, self.report, self._open_wider = self._open_first(batch)
            self._element_spec = element_spec_of(batch)
        else:
            require_alike(self._element_spec, batch)
        wider = widened(self._element_spec, batch)
        if wider is not self._element_spec:
            self._transaction = self._open_wider(wider, self._transaction)
            self._element_spec = wider
        return self._transaction.train(batch)
