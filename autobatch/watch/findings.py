"""Findings of the memory watch: the records, the causes that it can name, and the words for them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from autobatch.units import format_bytes

_EXPLAINS = 0.5  # what was counted accounts for the growth if it is at least this share of it


class Cause(enum.Enum):
    """Why memory grows from epoch to epoch."""

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
    "keras.backend.clear_session().",
    Cause.DATA: "Keep results as numbers or write them to disk; give cache() a file name, and shuffle() a smaller "
    "buffer. Growth by cache() ends once all data have been read.",
    Cause.GARBAGE: "Call gc.collect() at the end of each epoch, or break the cycle: an object that holds tensors "
    "refers to itself, so that Python frees it late.",
    Cause.UNKNOWN: "Train without your own callbacks, then without your own input pipeline, to see which one it is; "
    "training from a checkpoint in a new process starts from little again.",
}


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory at the end of one epoch.

    ``fit`` counts the trainings that the same watch has seen, ``epoch`` is Keras's, both from 0. ``device_bytes`` is
    what TensorFlow's allocator holds on a GPU or in a limited CPU arena, ``device_peak_bytes`` the most that it held;
    ``host_bytes`` what of the process is in the host's memory. ``traces`` is by how many the TensorFlow functions that
    this training has made and that are in memory grew over the epoch, 0 where they became fewer. Each is None where it
    is not known.
    """

    fit: int
    epoch: int
    device_bytes: int | None = None
    device_peak_bytes: int | None = None
    host_bytes: int | None = None
    traces: int | None = None


@dataclass(frozen=True, slots=True)
class Census:
    """What was alive in the process at one moment; bytes are of what could be sized.

    ``functions`` counts TensorFlow functions, one a trace, None where they cannot be counted; ``tensors`` the eager
    tensors with values, ``arrays`` the NumPy arrays in lists, ``memory_caches`` the ``tf.data`` caches without a file.
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
        """Bytes of the eager tensors on the "device" or the "host"."""
        return self.device_tensor_bytes if where == "device" else self.host_tensor_bytes


@dataclass(frozen=True, slots=True)
class MemoryFinding:
    """A steady growth, its likely cause and the remedy.

    ``where`` is "device" or "host". ``per`` is "epoch", or "fit" for a growth from one training to the next one that
    the same watch saw; ``bytes_per_epoch`` and ``epochs_left`` count in it. ``epochs_left`` is how many more fit into
    ``available_bytes``, None where these are not known; ``left_bytes`` what would be left of them after the last
    epoch, below zero if they do not suffice, None where the last epoch is not known.
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
    """Return the likely cause of a growth by ``grown_bytes`` over ``steps`` epochs, from what was alive around it.

    ``mark`` is from its beginning, ``now`` from its end, ``collected`` from after a garbage collection then. Garbage
    counts as growth only where there is more of it than at the mark. What is counted in bytes comes first, then what
    brings the next one with it: a model built again is traced again.
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
    """Make the finding and its text. ``step`` and ``last_step`` count from 1, as Keras prints epochs."""
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
