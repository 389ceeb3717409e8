"""Private parts of ``tf.data``: the only place that touches them.

Seen with TensorFlow 2.16 to 2.21. Where a name has moved, the functions here answer "unknown" (None, or an empty list)
and their callers do without; ``tests/seams/test_tf_data.py`` fails loudly.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2 as _graph_pb2
from tensorflow.python.data.ops import dataset_ops as _dataset_ops

from autobatch.seams.patching import replaced
from autobatch.seams.variables import in_order_of_creation

_MOST_GRAPH_BYTES = 256 * 2**20
"""Most bytes of tensors in a dataset that is copied by way of its graph, which holds them a second time."""


def inputs_of(dataset: Any) -> list[Any]:
    """Return the datasets that this one reads; an empty list for a source, and where tf.data does not show them."""
    inputs = getattr(dataset, "_inputs", None)
    return list(inputs()) if callable(inputs) else []


def kind_of(dataset: Any) -> str:
    """Return the kind of a dataset by its class: "Batch", "ParallelMap", "Shuffle", "TensorSlice", ..."""
    name = type(dataset).__name__.lstrip("_")
    return name.removesuffix("DatasetV1").removesuffix("V2").removesuffix("Dataset")


def constant_of(dataset: Any, attribute: str) -> Any:
    """Return the value of a dataset's argument, such as ``_buffer_size``; None where it is not known beforehand."""
    value = getattr(dataset, attribute, None)
    if tf.is_tensor(value):
        value = tf.get_static_value(value)
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 else value


def padding_of(dataset: Any) -> tuple[Any, Any] | None:
    """Return ``(padded_shapes, padding_values)`` of a padded batch; None if it is not one."""
    if kind_of(dataset) != "PaddedBatch" or not hasattr(dataset, "_padded_shapes"):
        return None
    return dataset._padded_shapes, dataset._padding_values


def tensors_in(dataset: Any) -> list[Any]:
    """Return the tensors that a dataset holds itself, and those of all datasets that it reads."""
    held = list(getattr(dataset, "_tensors", None) or [])
    for source in inputs_of(dataset):
        held += tensors_in(source)
    return held


def mapped_in_turn(dataset: Any) -> Any:
    """Return a parallel map, behind options or not, as a map that is called when an element is asked for.

    The function is traced anew. The dataset itself is returned if it is no such map, or tf.data does not show it.
    """
    source, *others = inputs_of(dataset) or [None]
    if kind_of(dataset) == "Options" and not others:
        return mapped_in_turn(source).with_options(dataset.options())
    function = getattr(getattr(dataset, "_map_func", None), "_func", None)
    if kind_of(dataset) != "ParallelMap" or function is None or others:
        return dataset
    return source.map(function)


def independent_copy(dataset: Any, *, keep_order: bool, may_call_python: bool) -> Any:
    """Return a dataset of the same elements whose reading moves nothing in ``dataset``; None if there is none.

    A dataset that shuffles anew each time draws from a seed generator, which a plain copy would share. A ``cache()``
    that is not read to its end is of no use. So the copy has no caches. Its shuffles have generators of their own with
    ``keep_order``; otherwise they are left out, which spares filling their buffers.

    The copy calls Python's generators and functions within the dataset as well. Some cannot be called again without
    losing something, as ``from_generator(lambda: iterator)``. Unless ``may_call_python``, a dataset with any has no
    copy.
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


def variables_in(dataset: Any) -> list[Any]:
    """Return the variables that functions in a dataset use, as a ``tf.random.Generator``'s, as they were created."""
    found: dict[int, Any] = {}
    for function in _functions_of(dataset):
        for variable in getattr(getattr(getattr(function, "function", None), "graph", None), "variables", ()):
            found.setdefault(id(variable), variable)
    for source in inputs_of(dataset):
        found.update((id(variable), variable) for variable in variables_in(source))
    return in_order_of_creation(found.values())


def _functions_of(dataset: Any) -> list[Any]:
    functions = getattr(dataset, "_functions", None)
    return list(functions()) if callable(functions) else []


def caches_what_is_drawn(dataset: Any) -> bool:
    """Return True if a ``cache()`` in memory holds what random numbers have decided in the first pass."""
    if kind_of(dataset) == "Cache" and constant_of(dataset, "_filename") in ("", b""):
        return any(_draws(source) for source in inputs_of(dataset))
    return any(caches_what_is_drawn(source) for source in inputs_of(dataset))


def draw_as_if_read(dataset: Any) -> None:
    """Draw from the seeds of shuffles what a pass that is read to its end draws beyond what ``iter(dataset)`` does.

    A shuffle begins its source when its first element is asked for, a concatenation its second source at the end of the
    first, and a repetition its source anew each time. No element is read here. What lies before a cache is drawn once,
    when the cache is filled.
    """
    kind = kind_of(dataset)
    if kind == "Cache":
        return
    first, *others = inputs_of(dataset) or [None]
    if first is None:
        return
    if kind.startswith("Shuffle"):
        iter(first)
    draw_as_if_read(first)
    for source in others:
        if kind == "Concatenate":
            iter(source)
        draw_as_if_read(source)
    count = constant_of(dataset, "_count") if kind == "Repeat" else None
    for _ in range(count - 1 if isinstance(count, int) else 0):
        iter(first)
        draw_as_if_read(first)


def _draws(dataset: Any) -> bool:
    """Return False if every pass over a dataset is surely the same."""
    if variables_in(dataset):
        return True
    try:
        serialized = dataset._as_serialized_graph(external_state_policy=tf.data.experimental.ExternalStatePolicy.IGNORE)
        graph = _graph_pb2.GraphDef.FromString(serialized.numpy())
    except (AttributeError, TypeError, ValueError, tf.errors.OpError):
        return True
    nodes = itertools.chain(graph.node, *(function.node_def for function in graph.library.function))
    drawing = ("Shuffle", "Random", "Stateful", "PyFunc", "EagerPyFunc")
    return any(node.op.startswith(drawing) or "seed2" in node.attr for node in nodes)


def draws_without_seed(dataset: Any) -> list[str]:
    """Return the types of operations in a dataset that draw random numbers which no seed decides, in order of name."""
    try:
        serialized = dataset._as_serialized_graph(external_state_policy=tf.data.experimental.ExternalStatePolicy.IGNORE)
        graph = _graph_pb2.GraphDef.FromString(serialized.numpy())
    except (AttributeError, TypeError, ValueError, tf.errors.OpError):
        return sorted(_shuffles_without_seed(dataset))
    found = set()
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        constants = {
            node.name: tf.make_ndarray(node.attr["value"].tensor)
            for node in nodes
            if node.op == "Const" and node.attr["dtype"].type == tf.int64.as_datatype_enum
        }
        for node in nodes:
            if node.op.startswith("ShuffleDataset") or node.op.startswith("ShuffleAndRepeatDataset"):
                seeds = [constants.get(name.partition(":")[0]) for name in node.input[2:4]]
                if all(seed is not None and not seed.any() for seed in seeds):
                    found.add("shuffle")
            elif "seed2" in node.attr and not node.attr["seed"].i and not node.attr["seed2"].i:
                found.add(node.op)
    return sorted(found)


def _shuffles_without_seed(dataset: Any) -> set[str]:
    seeds = [constant_of(dataset, name) for name in ("_seed", "_seed2")]
    found = {"shuffle"} if kind_of(dataset) == "Shuffle" and not any(seeds) else set()
    return found.union(*(_shuffles_without_seed(source) for source in inputs_of(dataset)))


@contextlib.contextmanager
def generators_made_by(make: Callable[[Callable[[], Iterable[Any]]], Iterable[Any]]) -> Iterator[None]:
    """Let ``tf.data.Dataset.from_generator(original)`` give what ``make(original)`` gives, within the context."""

    def replacement(from_generator: Callable[..., Any]) -> Callable[..., Any]:
        return lambda generator, *args, **kwargs: from_generator(lambda: make(generator), *args, **kwargs)

    with replaced(tf.data.Dataset, "from_generator", replacement):
        yield
