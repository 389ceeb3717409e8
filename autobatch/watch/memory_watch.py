"""`MemoryWatch`: memory growth from epoch to epoch, and its likely cause.

After an epoch it reads two or three numbers. Live objects are counted only once memory has grown, and again when the
growth has proved to be steady. The difference shows the cause. This module only measures: `steady_growth` decides what
is steady, and `findings` what a difference means.
"""

from __future__ import annotations

import collections
import gc
import logging
import os
import sys
import weakref
from typing import Any

import keras

from autobatch.errors import warn
from autobatch.memory import arena, limits
from autobatch.seams import eager_context
from autobatch.units import format_bytes
from autobatch.watch import findings, live_objects, steady_growth
from autobatch.watch.evidence import LATE_STEPS, Evidence
from autobatch.watch.findings import Cause, Census, MemoryFinding, MemorySample

logger = logging.getLogger("autobatch")

ONCE_STEADY = "once steady"


class MemoryWatch(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """A Keras callback that watches device and host memory, and warns once for each cause of a steady growth.

    ::

        watch = MemoryWatch()
        model.fit(dataset, epochs=50, callbacks=[watch])
        watch.samples, watch.findings

    If one watch is given to several trainings, such as those of a search over models, it finds a growth from training
    to training as well. It watches this process and the device that computes; of several GPUs the first.

    Host memory is the process's resident set. On Linux it is read from /proc. On macOS it is the peak, which grows with
    a leak as well. On Windows it is not watched. On a CPU without an arena, device memory is the host's.

    Args:
        warmup_epochs: Epochs of each training that may grow: the first one traces, allocates the optimizer's slots
            and fills ``cache()``. At least 1.
        verbose: 1 logs each epoch's memory, to the logger "autobatch" at level INFO.
        look_for_cause: True counts live Python objects once memory grows, to name the cause. "once steady" counts
            only once the growth has proved to be steady, so never in a healthy training, and names the cause two
            epochs later; the watch that ``autobatch.fit`` adds does this. False recognises no cause but retracing.

    Attributes:
        samples: A :class:`MemorySample` for each epoch.
        findings: A :class:`MemoryFinding` for each cause found, as warned about.
    """

    def __init__(self, *, warmup_epochs: int = 1, verbose: int = 0, look_for_cause: bool | str = True) -> None:
        super().__init__()
        if isinstance(warmup_epochs, bool) or not isinstance(warmup_epochs, int):
            raise TypeError(f"warmup_epochs is a whole number. Received: {warmup_epochs!r}")
        if warmup_epochs < 1:
            raise ValueError(f"warmup_epochs must be at least 1. Received: {warmup_epochs!r}")
        if look_for_cause not in (True, False, ONCE_STEADY):
            raise ValueError(f"look_for_cause is True, False or {ONCE_STEADY!r}. Received: {look_for_cause!r}")
        self.samples: tuple[MemorySample, ...] = ()
        self.findings: tuple[MemoryFinding, ...] = ()
        self._warmup_epochs = warmup_epochs
        self._verbose = verbose
        self._look_for_objects = bool(look_for_cause)
        self._marks_late = look_for_cause == ONCE_STEADY
        self._device: str | None = None
        self._fit = -1
        self._epochs_seen = 0
        self._functions_before: set[str] | None = None
        self._functions: int | None = None
        self._epochs: dict[str, Evidence] = {}
        self._fits = self._no_evidence()

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to watch a training, whose first epochs are its warm-up."""
        self._fit += 1
        self._epochs_seen = 0
        device = limits.default_device()
        self._device = device if device.startswith("GPU") or arena.arena_limit_bytes(device) is not None else None
        self._functions_before = eager_context.live_functions()
        self._functions = 0
        if self._device is not None:
            limits.reset_peak(self._device)  # the peak of a search before it is not that of this training
        self._epochs = self._no_evidence()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Take a sample after Keras's validation, and report a growth that has proved to be steady."""
        sample = self._sample(epoch)
        self.samples = (*self.samples, sample)
        if self._verbose:
            logger.info("%s", _describe_sample(sample))
        self._epochs_seen += 1
        if self._epochs_seen >= self._warmup_epochs:
            self._consider(self._epochs, sample, per="epoch", step=epoch + 1, last_step=self.params.get("epochs"))

    def on_train_end(self, logs: Any = None) -> None:
        """Report a growth not compared yet, and compare the end of this training with the ends of those before it."""
        if self._epochs_seen:
            last = self.samples[-1]
            for where, evidence in self._epochs.items():
                if (slope := evidence.unreported) is not None:
                    epochs = self.params.get("epochs")
                    self._report(evidence, slope, last, where, per="epoch", step=last.epoch + 1, last_step=epochs)
            self._consider(self._fits, last, per="fit", step=self._fit + 1, last_step=None)

    def _sample(self, epoch: int) -> MemorySample:
        before, self._functions = self._functions, self._count_functions()
        return MemorySample(
            fit=self._fit,
            epoch=epoch,
            device_bytes=self._level("device"),
            device_peak_bytes=None if self._device is None else limits.peak_bytes(self._device),
            host_bytes=self._level("host"),
            traces=None if before is None or self._functions is None else max(self._functions - before, 0),
        )

    def _count_functions(self) -> int | None:
        """Return the number of this training's functions; those of an earlier one may be freed at any moment."""
        functions, before = eager_context.live_functions(), self._functions_before
        return None if functions is None or before is None else len(functions - before)

    def _consider(
        self, places: dict[str, Evidence], sample: MemorySample, *, per: str, step: int, last_step: int | None
    ) -> None:
        for where, evidence in places.items():
            level = sample.device_bytes if where == "device" else sample.host_bytes
            if level is None:
                continue
            slope = evidence.add(level, self._mark)
            if slope is None and self._ends_soon(evidence.unreported, where, sample):
                slope = evidence.unreported
            if slope is not None:
                self._report(evidence, slope, sample, where, per=per, step=step, last_step=last_step)

    def _ends_soon(self, slope: float | None, where: str, sample: MemorySample) -> bool:
        """Return True if memory may run out before the cause of a steady growth is known."""
        available = None if slope is None else self._room(where, sample)[0]
        return slope is not None and available is not None and available < (LATE_STEPS + 1) * slope

    def _report(
        self,
        evidence: Evidence,
        slope: float,
        sample: MemorySample,
        where: str,
        *,
        per: str,
        step: int,
        last_step: int | None,
    ) -> None:
        if self.findings and not evidence.since_mark[0]:
            return  # nothing to compare yet, so nothing new to say
        cause, detail = self._look_for_cause(evidence, where, per)
        evidence.restart(self._level(where))
        if any(finding.cause is cause for finding in self.findings):
            return
        available, limit = self._room(where, sample)
        finding = findings.describe(
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
        warn(finding.message)

    def _look_for_cause(self, evidence: Evidence, where: str, per: str) -> tuple[Cause, str]:
        """Compare live objects with the mark; return the likely cause of the growth, and details in words."""
        mark, names_at_mark, tensors_at_mark = evidence.mark
        steps, grown = evidence.since_mark
        if not steps:
            return self._cause_without_comparison()
        now = self._census()
        gc.collect()
        collected = self._census()
        cause = findings.explain(mark, now, collected, grown, where=where, steps=steps)
        each = f"{'an' if per == 'epoch' else 'a'} {per}"
        detail = ""
        if cause is Cause.TENSORS:
            kept = live_objects.where_kept(tensors_at_mark)
            detail = f"tensors: {(collected.tensors - mark.tensors) / steps:.0f} more {each}{kept}"
        elif cause is Cause.MODELS:
            detail = f"layers: {(now.layers - mark.layers) / steps:.0f} more {each}"
            if now.layers - collected.layers >= steps:
                detail += ", of models that were dropped but wait for Python's garbage collection"
        elif cause is Cause.RETRACING:
            count = (now.functions or 0) - (mark.functions or 0)
            new = collections.Counter(
                map(live_objects.function_name, (eager_context.live_functions() or set()) - names_at_mark)
            )
            most = "".join(f", most of them of {name!r}" for name, _ in new.most_common(1))
            detail = f"new traces: {count / steps:.0f} {each}{most}"
        elif cause is Cause.DATA and collected.arrays > mark.arrays:
            detail = f"NumPy arrays in Python containers: {(collected.arrays - mark.arrays) / steps:.0f} more {each}"
        elif cause is Cause.DATA:
            detail = "the input pipeline has a tf.data cache() in memory, and nothing else that was counted grew"
        elif cause is Cause.GARBAGE:
            freed = now.tensor_bytes(where) - collected.tensor_bytes(where) + now.array_bytes - collected.array_bytes
            detail = f"a garbage collection just freed {format_bytes(freed)}"
        elif not self._look_for_objects:
            detail = "look_for_cause=True compares what is alive"
        return cause, detail

    def _cause_without_comparison(self) -> tuple[Cause, str]:
        """Return the cause and details as far as samples show them, if training ends before objects can be compared."""
        traces = [sample.traces or 0 for sample in self.samples[-steady_growth.MINIMUM_STEPS :]]
        if min(traces) > 0:
            return Cause.RETRACING, f"new traces: {sum(traces) / len(traces):.0f} an epoch"
        return Cause.UNKNOWN, (
            "there was no epoch left to compare what is alive: callbacks=[autobatch.MemoryWatch()] compares earlier"
        )

    def _no_evidence(self) -> dict[str, Evidence]:
        return {where: Evidence(marks_late=self._marks_late) for where in ("device", "host")}

    def _mark(self) -> tuple[Census, frozenset[str], dict[int, weakref.ref[Any]]]:
        """Return a census, the names of functions and the tensors, to recognise new ones later."""
        if self._marks_late:
            gc.collect()  # old garbage is no part of what grows from here
        tensors = live_objects.remember_tensors() if self._look_for_objects else {}
        return self._census(), frozenset(eager_context.live_functions() or ()), tensors

    def _census(self) -> Census:
        if self._look_for_objects:
            return live_objects.census()
        return Census(live_objects.function_count(), 0, 0, 0, 0, 0, 0, 0)

    def _level(self, where: str) -> int | None:
        if where == "host":
            return _host_bytes()
        return None if self._device is None else limits.bytes_in_use(self._device)

    def _room(self, where: str, sample: MemorySample) -> tuple[int | None, int | None]:
        """Return the bytes still available, and the bytes that this process may have in all; None if not known."""
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
    """Return the process's resident set; without /proc its peak; None on Windows."""
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


def _describe_sample(sample: MemorySample) -> str:
    parts = []
    for name, level in (("device", sample.device_bytes), ("host", sample.host_bytes)):
        if level is not None:
            parts.append(f"{name} memory {format_bytes(level)}")
    if sample.traces:
        parts.append(f"{sample.traces} new traces")
    return f"epoch {sample.epoch + 1}: {', '.join(parts) or 'memory unknown'}"
