"""`MemoryWatch`: memory growth from epoch to epoch, and its likely cause.

After an epoch it reads two or three numbers. What is alive in the process is counted only once memory has grown, and
again when the growth has proved to be steady; the difference tells the cause. What is steady, and what a difference
means, `growth` decides; here it is only measured.
"""

from __future__ import annotations

import collections
import gc
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.errors import AutobatchWarning
from autobatch.memory import arena, limits
from autobatch.train import growth
from autobatch.train.growth import Cause, Census, Evidence, MemoryFinding, MemorySample
from autobatch.units import format_bytes

logger = logging.getLogger("autobatch")

_FUNCTION_NAME = re.compile(r"__(?:inference|forward|backward)_(.+?)_\d+(?:_\d+)*$")
_CONTAINERS = (list, dict, tuple, set, collections.deque)
_FEW = 16  # tensors whose holder is looked for


class MemoryWatch(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """Watches device and host memory, and warns once for each cause of a steady growth.

    ::

        watch = MemoryWatch()
        model.fit(dataset, epochs=50, callbacks=[watch])
        watch.samples, watch.findings

    Give one watch to several trainings, such as those of a search over models, and a growth from training to training
    is found as well. It watches this process and the device that computes; of several GPUs the first.

    Host memory is the process's resident set, from /proc on Linux; on macOS the most that it has been, which grows
    with a leak as well; on Windows it is not watched. On a CPU without an arena, device memory is the host's.

    Args:
        warmup_epochs: Epochs of each training that may grow: the first one traces, allocates the optimizer's slots
            and fills ``cache()``. At least 1.
        verbose: 1 logs each epoch's memory, to the logger "autobatch" at level INFO.
        look_for_cause: Once memory grows, count what is alive among Python's objects to name the cause. Without it only
            retracing is told apart.

    Attributes:
        samples: A :class:`MemorySample` for each epoch.
        findings: A :class:`MemoryFinding` for each cause found, as warned about.
    """

    def __init__(self, *, warmup_epochs: int = 1, verbose: int = 0, look_for_cause: bool = True) -> None:
        super().__init__()
        if isinstance(warmup_epochs, bool) or not isinstance(warmup_epochs, int):
            raise TypeError(f"warmup_epochs is a whole number. Received: {warmup_epochs!r}")
        if warmup_epochs < 1:
            raise ValueError(f"warmup_epochs must be at least 1. Received: {warmup_epochs!r}")
        self.samples: tuple[MemorySample, ...] = ()
        self.findings: tuple[MemoryFinding, ...] = ()
        self._warmup_epochs = warmup_epochs
        self._verbose = verbose
        self._look_for_objects = look_for_cause
        self._device: str | None = None
        self._fit = -1
        self._epochs_seen = 0
        self._functions: int | None = None
        self._epochs: dict[str, Evidence] = {}
        self._fits = {"device": Evidence(), "host": Evidence()}

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin a training: its own first epochs are its warm-up."""
        self._fit += 1
        self._epochs_seen = 0
        device = limits.default_device()
        self._device = device if device.startswith("GPU") or arena.arena_limit_bytes(device) is not None else None
        self._functions = _count(_live_functions())
        if self._device is not None:
            limits.reset_peak(self._device)  # what a search tried before is not what this training needs
        self._epochs = {"device": Evidence(), "host": Evidence()}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Sample, and report what has proved to grow. Keras has validated by now."""
        sample = self._sample(epoch)
        self.samples = (*self.samples, sample)
        if self._verbose:
            logger.info("%s", _describe_sample(sample))
        self._epochs_seen += 1
        if self._epochs_seen >= self._warmup_epochs:
            self._consider(self._epochs, sample, per="epoch", step=epoch + 1, last_step=self.params.get("epochs"))

    def on_train_end(self, logs: Any = None) -> None:
        """Compare this training's end with those of the ones before it."""
        if self._epochs_seen:
            self._consider(self._fits, self.samples[-1], per="fit", step=self._fit + 1, last_step=None)

    def _sample(self, epoch: int) -> MemorySample:
        before, self._functions = self._functions, _count(_live_functions())
        return MemorySample(
            fit=self._fit,
            epoch=epoch,
            device_bytes=self._level("device"),
            device_peak_bytes=None if self._device is None else limits.peak_bytes(self._device),
            host_bytes=self._level("host"),
            traces=None if before is None or self._functions is None else self._functions - before,
        )

    def _consider(
        self, places: dict[str, Evidence], sample: MemorySample, *, per: str, step: int, last_step: int | None
    ) -> None:
        for where, evidence in places.items():
            level = sample.device_bytes if where == "device" else sample.host_bytes
            if level is None:
                continue
            slope = evidence.add(level, self._mark)
            if slope is None:
                continue
            cause, detail = self._look_for_cause(evidence, where, per)
            evidence.restart(self._level(where))
            if any(finding.cause is cause for finding in self.findings):
                continue
            available, limit = self._room(where, sample)
            finding = growth.describe(
                where=where,
                per=per,
                step=step,
                last_step=last_step,
                bytes_per_step=slope,
                available_bytes=available,
                limit_bytes=limit,
                cause=cause,
                detail=detail,
            )
            self.findings = (*self.findings, finding)
            warnings.warn(finding.message, AutobatchWarning, stacklevel=2)

    def _look_for_cause(self, evidence: Evidence, where: str, per: str) -> tuple[Cause, str]:
        """Compare what is alive with the mark that was set when memory began to grow."""
        mark, names_at_mark, tensors_at_mark = evidence.mark
        steps, grown = evidence.since_mark
        now = self._census()
        gc.collect()
        collected = self._census()
        cause = growth.explain(mark, now, collected, grown, where=where, steps=steps)
        each = f"{'an' if per == 'epoch' else 'a'} {per}"
        detail = ""
        if cause is Cause.TENSORS:
            detail = (
                f"tensors: {(collected.tensors - mark.tensors) / steps:.0f} more {each}{_where_kept(tensors_at_mark)}"
            )
        elif cause is Cause.MODELS:
            detail = f"layers: {(now.layers - mark.layers) / steps:.0f} more {each}"
            if now.layers - collected.layers >= steps:
                detail += ", of models that were dropped but wait for Python's garbage collection"
        elif cause is Cause.RETRACING:
            count = (now.functions or 0) - (mark.functions or 0)
            new = collections.Counter(map(_function_name, (_live_functions() or set()) - names_at_mark))
            most = "".join(f", most of them of {name!r}" for name, _ in new.most_common(1))
            detail = f"new traces: {count / steps:.0f} {each}{most}"
        elif cause is Cause.DATA and collected.arrays > mark.arrays:
            detail = f"NumPy arrays in Python containers: {(collected.arrays - mark.arrays) / steps:.0f} more {each}"
        elif cause is Cause.DATA:
            detail = "the input pipeline has a tf.data cache() in memory, and nothing else that was counted grew"
        elif cause is Cause.GARBAGE:
            freed = now.tensor_bytes(where) - collected.tensor_bytes(where) + now.array_bytes - collected.array_bytes
            detail = f"a garbage collection just freed {format_bytes(freed)}"
        return cause, detail

    def _mark(self) -> tuple[Census, frozenset[str], frozenset[int]]:
        """What is alive, the functions' names and the tensors' ids, to tell which ones are new later on."""
        tensors = map(id, _live_tensors()) if self._look_for_objects else ()
        return self._census(), frozenset(_live_functions() or ()), frozenset(tensors)

    def _census(self) -> Census:
        if self._look_for_objects:
            return _census()
        return Census(_count(_live_functions()), 0, 0, 0, 0, 0, 0, 0)

    def _level(self, where: str) -> int | None:
        if where == "host":
            return _host_bytes()
        return None if self._device is None else limits.bytes_in_use(self._device)

    def _room(self, where: str, sample: MemorySample) -> tuple[int | None, int | None]:
        """Bytes that are still available, and those that this process may have in all."""
        if where == "device":
            limit = limits.find_limit(str(self._device)).limit_bytes
            used = max(sample.device_bytes or 0, sample.device_peak_bytes or 0)
            return (None, None) if limit is None else (limit - used, limit)
        # The arena's own limit says nothing about the host; the others count what the allocator holds as available.
        found = [each.limit_bytes for each in limits.all_limits("CPU:0") if not each.enforced and each.limit_bytes]
        if not found:
            return None, None
        available = min(found) - (limits.bytes_in_use("CPU:0") or 0)
        return available, available + (sample.host_bytes or 0)


def _host_bytes() -> int | None:
    """The process's resident set; its peak where only that is told; None on Windows."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _live_functions() -> set[str] | None:
    """The names of all functions that TensorFlow's eager context holds: each trace adds one, until it is freed.

    Private; seen in TensorFlow 2.21. None where it has moved: then retracing is not found.
    """
    try:
        from tensorflow.python.eager import context

        return set(context.context().list_function_names())
    except (ImportError, AttributeError):
        return None


def _count(names: Collection[str] | None) -> int | None:
    return None if names is None else len(names)


def _function_name(name: str) -> str:
    match = _FUNCTION_NAME.match(name)
    return match.group(1) if match else name


def _live_tensors() -> list[Any]:
    eager = type(tf.constant(0))
    return [found for found in gc.get_objects() if type(found) is eager]


def _census() -> Census:
    """Count what is alive. Types are told by their bases, since ``isinstance`` may run code of the object's own."""
    kinds: dict[int, Any] = {}
    counts: collections.Counter[Any] = collections.Counter()
    tensor_bytes: collections.Counter[str] = collections.Counter()
    arrays: dict[int, int] = {}
    for found in gc.get_objects():
        exact = type(found)
        try:
            kind = kinds[id(exact)]
        except KeyError:
            kind = kinds[id(exact)] = _kind(exact)
        if kind is None:
            continue
        if kind is list or kind is dict:
            for array in _arrays_in(found, kind):
                base = array if array.base is None else array.base  # many slices of one array are that array
                arrays[id(base)] = int(getattr(base, "nbytes", array.nbytes))
            continue
        if kind is tf.Tensor:
            tensor_bytes["GPU" if "GPU" in found.device else "CPU"] += _tensor_bytes(found)
        elif kind is tf.data.Dataset and _has_file(found):
            continue
        counts[kind] += 1
    return Census(
        functions=_count(_live_functions()),
        tensors=counts[tf.Tensor],
        host_tensor_bytes=tensor_bytes["CPU"],
        device_tensor_bytes=tensor_bytes[limits.default_device().partition(":")[0]],
        layers=counts[keras.layers.Layer],
        arrays=len(arrays),
        array_bytes=sum(arrays.values()),
        memory_caches=counts[tf.data.Dataset],
    )


def _kind(exact: type) -> Any:
    """What this type is counted as, None if not at all. ``tf.data.Dataset`` stands for ``cache()`` alone."""
    bases = exact.__mro__
    for kind in (tf.Tensor, keras.layers.Layer, tf.data.Dataset, list, dict):
        if kind in bases:
            # Private names, seen in TensorFlow 2.21. Where they have moved, these are not found.
            name = {tf.Tensor: "EagerTensor", tf.data.Dataset: "CacheDataset"}.get(kind, exact.__name__)
            return kind if name == exact.__name__ else None
    return None


def _has_file(cache: Any) -> bool:
    name: Any = getattr(cache, "_filename", None)  # in a graph, its value is not known
    return type(name).__name__ == "EagerTensor" and bool(name.numpy())


def _tensor_bytes(tensor: Any) -> int:
    # Handles and strings have no size of their own.
    return int(tensor.dtype.size * (tensor.shape.num_elements() or 0))


def _arrays_in(container: Any, kind: Any) -> Collection[Any]:
    """The arrays in a container, or in the tuples of a list.

    Asked of the garbage collector, not of the container: a list that C code is still filling has holes, and to iterate
    over one is a segmentation fault.
    """
    items = gc.get_referents(container)
    if kind is list and items and type(items[-1]) is tuple:
        items = gc.get_referents(*(item for item in items if type(item) is tuple))
    return [item for item in items if type(item) is np.ndarray]


def _where_kept(known: Collection[int]) -> str:
    """Say what holds the largest new tensors: ", in a list, attribute 'kept' of Watched"; "" if it cannot be told."""
    tensors = sorted((tensor for tensor in _live_tensors() if id(tensor) not in known), key=_tensor_bytes)
    tensors = [tensor for tensor in tensors[-_FEW:] if 2 * _tensor_bytes(tensor) >= _tensor_bytes(tensors[-1])]
    own = [tensors]
    held: list[Any] = tensors
    for _ in range(3):
        containers = [
            referrer
            for referrer in gc.get_referrers(*held)
            if _container_kind(referrer) is not None and all(referrer is not mine for mine in own)
        ]
        if not containers:
            return ""
        longest = max(containers, key=_length)
        if _length(longest) >= max(len(tensors) // 2, 2):
            return f", in a {_container_kind(longest).__name__}{_owner(longest)}"
        # Pairs or dictionaries of a few tensors each: what holds those?
        own.append(containers)
        held = containers
    return ""


def _container_kind(found: Any) -> Any:
    bases = type(found).__mro__
    return next((kind for kind in _CONTAINERS if kind in bases), None)


def _length(container: Any) -> int:
    return int(_container_kind(container).__len__(container))


def _owner(container: Any) -> str:
    """Say which object has this container as an attribute."""
    for referrer in gc.get_referrers(container):
        # From Python 3.11 on an instance may hold its attributes itself, without a dictionary.
        names = referrer if type(referrer) is dict else getattr(type(referrer), "__dict__", {}).get("__dict__")
        if names is None or isinstance(referrer, types.FrameType):
            continue
        attributes = names if type(referrer) is dict else object.__getattribute__(referrer, "__dict__")
        name = next((key for key, value in list(attributes.items()) if value is container), None)
        if not isinstance(name, str):
            continue
        if type(referrer) is not dict:
            return f", attribute {name!r} of {type(referrer).__name__}"
        for holder in gc.get_referrers(referrer):
            if getattr(holder, "__dict__", None) is referrer:
                what = holder.__name__ if isinstance(holder, types.ModuleType) else type(holder).__name__
                return f", attribute {name!r} of {what}"
    return ""


def _describe_sample(sample: MemorySample) -> str:
    parts = []
    for name, level in (("device", sample.device_bytes), ("host", sample.host_bytes)):
        if level is not None:
            parts.append(f"{name} memory {format_bytes(level)}")
    if sample.traces:
        parts.append(f"{sample.traces} new traces")
    return f"epoch {sample.epoch + 1}: {', '.join(parts) or 'memory unknown'}"
