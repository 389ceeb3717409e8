"""Findings of the memory watch: their records, the causes that it can name, and their texts."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from autobatch.units import format_bytes

_EXPLAINS = 0.5  # counted bytes explain a growth if they are at least this share of it


class Cause(enum.Enum):
    """Cause of a growth of memory from epoch to epoch."""

    RETRACING = "retracing"
    TENSORS = "tensors kept"
    MODELS = "models built again"
    DATA = "data held in host memory"
    GARBAGE = "reference cycles"
    UNKNOWN = "unknown"


REMEDIES = {
    Cause.RETRACING: "Pass tensors of one shape and dtype instead of new Python numbers or shapes, make each "
    "tf.function once, outside the loop, or give it an input_signature or reduce_retracing=True.",
    Cause.TENSORS: "Keep numbers, float(tensor), or a running keras.metrics.Mean instead of tensors, and empty what is "
    "kept at the end of each epoch.",
    Cause.MODELS: "Build the model once, outside the loop; or, before each new one, del the old one and call "
    "keras.backend.clear_session(). Keras's own fit leaves a model's weights in memory even so, autobatch.fit none.",
    Cause.DATA: "Keep results as numbers or write them to disk; give cache() a file name, and shuffle() a smaller "
    "buffer. Growth by cache() ends once all data have been read.",
    Cause.GARBAGE: "Call gc.collect() at the end of each epoch, or break the cycle: an object that holds tensors "
    "refers to itself, so that Python frees it late.",
    Cause.UNKNOWN: "Train without your own callbacks, then without your own input pipeline, to see which one it is; "
    "training from a checkpoint in a new process starts from little again.",
}


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory at the end of one epoch. Every number but the first two is None if it is not known.

    Attributes:
        fit: number of the training among those that the same watch has seen, from 0.
        epoch: Keras's number of the epoch, from 0.
        device_bytes: bytes that TensorFlow's allocator holds on a GPU or in a limited CPU arena.
        device_peak_bytes: the most bytes that it held.
        host_bytes: the part of the process that is in the host's memory.
        traces: increase over the epoch in the TensorFlow functions that this training has made and that are in memory,
            0 if they became fewer.
    """

    fit: int
    epoch: int
    device_bytes: int | None = None
    device_peak_bytes: int | None = None
    host_bytes: int | None = None
    traces: int | None = None


@dataclass(frozen=True, slots=True)
class Census:
    """Counts of the objects alive in the process at one moment; bytes are those of objects with a known size.

    Attributes:
        functions: TensorFlow functions, one a trace; None if they cannot be counted.
        tensors: eager tensors with values.
        host_tensor_bytes: bytes of those on the host.
        device_tensor_bytes: bytes of those on the device.
        layers: Keras layers.
        arrays: NumPy arrays in lists and dictionaries.
        array_bytes: bytes of those arrays.
        memory_caches: ``tf.data`` caches without a file.
    """

    functions: int | None
    tensors: int
    host_tensor_bytes: int
    device_tensor_bytes: int
    layers: int
    arrays: int
    array_bytes: int
    memory_caches: int

    def tensor_bytes(self, where: str) -> int:
        """Return the bytes of the eager tensors on the "device" or the "host"."""
        return self.device_tensor_bytes if where == "device" else self.host_tensor_bytes


@dataclass(frozen=True, slots=True)
class MemoryFinding:
    """A steady growth, its likely cause and the remedy.

    Attributes:
        where: "device" or "host".
        per: "epoch", or "fit" for a growth from one training to the next that the same watch saw.
        bytes_per_epoch: growth for each ``per``.
        cause: the likely cause.
        detail: evidence for the cause, in words; may be empty.
        remedy: advice against the cause.
        available_bytes: memory still available; None if not known.
        epochs_left: number of further ``per`` that fit into ``available_bytes``; None if those are not known.
        left_bytes: part of ``available_bytes`` left after the last epoch, below zero if they do not suffice; None if
            they or the last epoch are not known.
        message: the text of the warning.
    """

    where: str
    per: str
    bytes_per_epoch: int
    cause: Cause
    detail: str
    remedy: str
    available_bytes: int | None
    epochs_left: int | None
    left_bytes: int | None
    message: str


def explain(mark: Census, now: Census, collected: Census, grown_bytes: int, *, where: str, steps: int) -> Cause:
    """Return the likely cause of a growth by ``grown_bytes`` over ``steps`` epochs, by comparing live objects.

    ``mark`` is from the beginning of the growth, ``now`` from its end, and ``collected`` from after a garbage
    collection at its end. Garbage counts as growth only if there is more of it than at the mark. Causes that are
    counted in bytes come first. Models come before retracing, because a model built again is traced again.
    """
    enough = _EXPLAINS * grown_bytes
    for cause, sizes in (
        (Cause.TENSORS, [each.tensor_bytes(where) for each in (mark, now, collected)]),
        (Cause.DATA, [each.array_bytes if where == "host" else 0 for each in (mark, now, collected)]),
    ):
        at_mark, at_end, left = sizes
        if left - at_mark >= enough > 0:
            return cause
        if at_end - at_mark >= enough > 0:
            return Cause.GARBAGE
    if now.layers - mark.layers >= steps:
        return Cause.MODELS
    if (now.functions or 0) - (mark.functions or 0) >= steps:
        return Cause.RETRACING
    if where == "host" and collected.memory_caches > 0:
        return Cause.DATA
    return Cause.UNKNOWN


def describe(
    *,
    where: str,
    per: str,
    step: int,
    last_step: int | None,
    bytes_per_step: float,
    available_bytes: int | None,
    limit_bytes: int | None,
    cause: Cause,
    detail: str,
) -> MemoryFinding:
    """Return the finding with its text. ``step`` and ``last_step`` count from 1, as Keras prints epochs."""
    name = "Device" if where == "device" else "Host"
    article = "an" if per == "epoch" else "a"
    parts = [f"{name} memory grows by {format_bytes(bytes_per_step)} {article} {per}"]
    steps_left = left = None
    if available_bytes is not None:
        steps_left = int(max(available_bytes, 0) // bytes_per_step)
        if last_step is not None:
            left = available_bytes - int(bytes_per_step * max(last_step - step, 0))
            if left >= 0:
                total = "" if limit_bytes is None else f" of {format_bytes(limit_bytes)}"
                parts.append(f"at this rate {format_bytes(left)}{total} are left after {per} {last_step}")
        parts.append(f"out of memory at about {per} {step + steps_left + 1}")
    text = "; ".join(parts)
    likely = "The cause was not found" if cause is Cause.UNKNOWN else f"Likely cause: {cause.value}"
    because = f"{likely} ({detail})." if detail else f"{likely}."
    return MemoryFinding(
        where=where,
        per=per,
        bytes_per_epoch=round(bytes_per_step),
        cause=cause,
        detail=detail,
        remedy=REMEDIES[cause],
        available_bytes=available_bytes,
        epochs_left=steps_left,
        left_bytes=left,
        message=f"{text}. {because} {REMEDIES[cause]}",
    )
