"""The only place of the data modules that touches what is private in ``tf.data`` and in Keras's data adapters.

Seen with TensorFlow 2.20 and 2.21 and with Keras 3.14 and 3.15. Where a name has moved, what is asked here answers
"unknown" (None) and the callers do without; ``tests/train/test_data_seams.py`` fails loudly.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.trainers import data_adapters as _data_adapters
from keras.src.trainers.data_adapters import array_data_adapter as _array_data_adapter
from tensorflow.core.framework import graph_pb2 as _graph_pb2
from tensorflow.python.data.ops import dataset_ops as _dataset_ops

_MOST_GRAPH_BYTES = 256 * 2**20
"""A dataset whose tensors are larger is not copied by way of its graph, which would hold them a second time."""


# -- Keras's data adapters --------------------------------------------------------------------------------------------


def are_arrays(*parts: Any) -> bool:
    """Whether Keras would slice these parts of the data itself; None counts as such."""
    return bool(_array_data_adapter.can_convert_arrays(parts))


def packed_arrays(adapter: Any) -> Any:
    """The structure of arrays that an array adapter slices, in the shape of the batches that it makes."""
    return adapter._inputs


def array_samples(adapter: Any) -> int:
    """How many samples an array adapter has."""
    return int(adapter._num_samples)


def py_dataset_of(adapter: Any) -> Any:
    """The ``keras.utils.PyDataset`` behind an adapter; None for every other kind of data."""
    return getattr(adapter, "py_dataset", None)


def torch_loader_of(adapter: Any) -> Any:
    """The ``torch.utils.data.DataLoader`` behind an adapter; None for every other kind of data."""
    return getattr(adapter, "_dataloader", None)


def is_dataset_adapter(adapter: Any) -> bool:
    """Whether the adapter passes on a ``tf.data.Dataset``."""
    return isinstance(adapter, _data_adapters.TFDatasetAdapter)


def batches_without_iterating(adapter: Any) -> Iterator[Any]:
    """A PyDataset's batches by index, or those of a new iterator of a torch loader, as the adapter would give them."""
    dataset = py_dataset_of(adapter)
    if dataset is None:
        yield from adapter.get_numpy_iterator()
        return
    index = 0
    while dataset.num_batches is None or index < dataset.num_batches:
        yield adapter._standardize_batch(dataset[index])
        index += 1


def samples_of_loader(adapter: Any, first_batch_samples: int | None) -> tuple[int | None, int | None]:
    """How many samples an epoch of a PyDataset or a torch loader may be expected to have: at least, at most.

    ``first_batch_samples`` is the size of its first batch, where it was looked at; the last may have fewer.
    """
    loader = torch_loader_of(adapter)
    if (
        loader is not None
        and adapter.num_batches is not None
        and loader.batch_size is not None
        and not loader.drop_last
    ):
        return len(loader.sampler), len(loader.sampler)
    is_loader = loader is not None or py_dataset_of(adapter) is not None
    if not is_loader or not first_batch_samples or not adapter.num_batches:
        return None, None
    batches = int(adapter.num_batches)
    return (batches - 1) * first_batch_samples + 1, batches * first_batch_samples


def signature_of(adapter: Any) -> Any:
    """The element spec of a PyDataset's or a torch loader's batches, once the adapter has made its dataset."""
    return adapter._output_signature


# -- tf.data ----------------------------------------------------------------------------------------------------------


def inputs_of(dataset: Any) -> list[Any]:
    """The datasets that this one reads; empty for a source, and where tf.data does not tell."""
    inputs = getattr(dataset, "_inputs", None)
    return list(inputs()) if callable(inputs) else []


def kind_of(dataset: Any) -> str:
    """What the dataset does, as its class says: "Batch", "ParallelMap", "Shuffle", "TensorSlice", ..."""
    name = type(dataset).__name__.lstrip("_")
    return name.removesuffix("DatasetV1").removesuffix("V2").removesuffix("Dataset")


def constant_of(dataset: Any, attribute: str) -> Any:
    """The value of one of the dataset's arguments, such as ``_buffer_size``; None where it is not known beforehand."""
    value = getattr(dataset, attribute, None)
    if tf.is_tensor(value):
        value = tf.get_static_value(value)
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 else value


def padding_of(dataset: Any) -> tuple[Any, Any] | None:
    """``(padded_shapes, padding_values)`` of a padded batch; None if it is not one."""
    if kind_of(dataset) != "PaddedBatch" or not hasattr(dataset, "_padded_shapes"):
        return None
    return dataset._padded_shapes, dataset._padding_values


def tensors_in(dataset: Any) -> list[Any]:
    """The tensors that a dataset and those that it reads hold themselves."""
    held = list(getattr(dataset, "_tensors", None) or [])
    for source in inputs_of(dataset):
        held += tensors_in(source)
    return held


def independent_copy(dataset: Any, *, keep_order: bool, may_call_python: bool) -> Any:
    """A dataset of the same elements that can be read without moving anything in ``dataset``; None if there is none.

    Reading a dataset that shuffles anew each time draws from a seed generator, which a plain copy would share, and a
    ``cache()`` that is not read to its end is of no use. So the copy has no caches, and its shuffles either have
    generators of their own (``keep_order``) or are left out, which spares filling their buffers.

    Python's generators and functions within the dataset are called by the copy as well. Where one cannot be called
    again without losing something, as ``from_generator(lambda: iterator)``, there must be no copy: ``may_call_python``.
    """
    if sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in tensors_in(dataset)) > _MOST_GRAPH_BYTES:
        return None
    try:
        serialized = dataset._as_serialized_graph(external_state_policy=tf.data.experimental.ExternalStatePolicy.IGNORE)
        graph = _graph_pb2.GraphDef.FromString(serialized.numpy())
        if _calls_python(graph) and not may_call_python:
            return None
        _cut_ties(graph, keep_order=keep_order)
        variant = tf.raw_ops.DatasetFromGraph(graph_def=graph.SerializeToString())
        return _dataset_ops._VariantDataset(variant, dataset.element_spec)
    except (AttributeError, TypeError, ValueError, tf.errors.OpError):
        return None


def _calls_python(graph: Any) -> bool:
    nodes = itertools.chain(graph.node, *(function.node_def for function in graph.library.function))
    return any(node.op in ("PyFunc", "PyFuncStateless", "EagerPyFunc") for node in nodes)


def _cut_ties(graph: Any, *, keep_order: bool) -> None:
    instead: dict[str, str] = {}
    own_generators = []
    for node in graph.node:
        shuffles = node.op.startswith("ShuffleDataset")
        if node.op.startswith("CacheDataset") or (shuffles and not keep_order):
            instead[node.name] = node.input[0]
        elif shuffles and node.op == "ShuffleDatasetV3":
            # buffer_size, seed, seed2 and the generator follow the dataset; a "dummy" makes the op create its own.
            own_generators.append(f"{node.name}/own_seed_generator")
            node.input[4] = own_generators[-1]
    for name in own_generators:
        graph.node.add(name=name, op="DummySeedGenerator")
    for node in graph.node:
        for position, name in enumerate(node.input):
            while name.partition(":")[0] in instead:
                name = instead[name.partition(":")[0]]
            node.input[position] = name


# -- the random numbers of Python code that makes data ----------------------------------------------------------------


class RandomStates:
    """The states of the global random generators that Python code draws from while it makes data.

    Python's, NumPy's, and torch's where it is loaded, with the generators that a torch loader was given.
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
        """Set every generator to its state as it was."""
        for set_state, state in self._parts():
            set_state(state)

    def replay(self, before: RandomStates, loader: Any = None) -> None:
        """Set to these states the generators that are in the states ``before``: nobody has drawn from them since."""
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
    """Whatever draws random numbers in here, the generators are as before afterwards."""
    states = RandomStates(loader)
    try:
        yield
    finally:
        states.restore()
