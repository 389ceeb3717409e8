"""Limits on the device memory of a process, on a GPU or on the CPU, set before TensorFlow starts its devices.

On a GPU the limit is TensorFlow's own logical device. On the CPU it is an arena of the allocator class that GPUs use
(BFC). TensorFlow puts the arena in front of the CPU's allocator when environment variables ask for it. A full arena
raises the same ``ResourceExhaustedError`` as a full GPU, so running out of memory is tested without a GPU.

Private names of TensorFlow used here: ``context``, ``_context``, ``_initialized`` and ``_config`` of
``tensorflow.python.eager.context``, seen in 2.16 to 2.21. Where one is missing, only speed and an early error message
are lost. ``tensorflow.core.protobuf.config_pb2`` and ``tensorflow.python.util._pywrap_util_port`` are used as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from types import ModuleType
from typing import Any

from autobatch.errors import warn
from autobatch.units import format_bytes, parse_bytes

logger = logging.getLogger(__name__)

MIB = 2**20
_USE_BFC = "TF_CPU_ALLOCATOR_USE_BFC"
_LIMIT_MIB = "TF_CPU_BFC_MEM_LIMIT_IN_MB"
_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
_AT_A_TIME = "TF_NUM_INTEROP_THREADS"
_DEFAULT_LIMIT_MIB = 2**16  # what TensorFlow takes where the BFC allocator is asked for and no limit is given


def limit_memory(limit: int | str) -> None:
    """Let this process use at most ``limit`` bytes of device memory; call it before TensorFlow starts its devices.

    With GPUs, each one that is visible becomes a logical device of this size. Without one, TensorFlow's tensors on the
    CPU live in a limited arena, and its operations run one at a time, as they do on a GPU. Side by side they would hold
    their workspaces together, and what a step needs would differ from run to run: for a small network a search found
    104 samples where 163 ran a moment later. The environment variable ``TF_NUM_INTEROP_THREADS`` and
    ``tf.config.threading.set_inter_op_parallelism_threads`` go before.

    Call it before ``import tensorflow`` or ``import keras`` where you can. On the CPU, TensorFlow decides during that
    import whether to use oneDNN, whose convolutions crash in a full arena. An `AutobatchWarning` says so if the call
    comes later.

    Args:
        limit: bytes, or text such as ``"512MiB"`` or ``"1.5GB"``; rounded down to whole MiB, at least one.

    Raises:
        ValueError: ``limit`` cannot be read, or is below 1 MiB.
        RuntimeError: TensorFlow's devices have been started already.
    """
    limit_bytes = parse_bytes(limit, name="limit")
    arena = arena_environment(limit_bytes)
    _require_not_started("limit_memory")
    before = {name: os.environ.get(name) for name in arena}
    # First the environment, then the import: TensorFlow reads oneDNN's switch while it is imported.
    os.environ.update(arena)
    with contextlib.ExitStack() as after_an_error:
        after_an_error.callback(_restore, before)
        gpus = _import_tensorflow().config.get_visible_devices("GPU")
        after_an_error.pop_all()
    if gpus:
        _restore(before)
        _limit_gpus(limit_bytes)
        return
    logger.info("TensorFlow's CPU memory is limited to %s", format_bytes(limit_bytes // MIB * MIB))
    if _onednn_enabled():
        warn(
            "TensorFlow was imported before limit_memory, so oneDNN stays on: a convolution that runs out of memory in "
            "the limited arena may crash the process instead of raising. Call autobatch.limit_memory before importing "
            f"tensorflow or keras, or start Python with {_ONEDNN}=0.",
        )


def configure_memory(growth: bool = True, limit: int | str | None = None) -> None:
    """Set how TensorFlow takes GPU memory, on all visible GPUs alike; call it before TensorFlow starts its devices.

    Args:
        growth: take memory as it is needed (True), or nearly all of it at the start (False, TensorFlow's default).
            With ``limit`` it has no effect: TensorFlow lets a limited device grow up to its limit.
        limit: upper bound on each GPU's memory for this process, in bytes or as text; None for no limit. This function
            leaves the CPU alone; `limit_memory` limits it too.

    Raises:
        RuntimeError: TensorFlow's devices have been started already.
    """
    if not isinstance(growth, bool):
        raise TypeError(f"growth must be True or False. Received: {growth!r} (of type {type(growth).__name__})")
    limit_bytes = None if limit is None else parse_bytes(limit, name="limit")
    if limit_bytes is not None:
        arena_environment(limit_bytes)  # raises below 1 MiB
    _require_not_started("configure_memory")
    tf = _import_tensorflow()
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        logger.info("configure_memory: TensorFlow sees no GPU; nothing to configure")
    elif limit_bytes is not None:
        _limit_gpus(limit_bytes)
    else:
        for gpu in gpus:
            if tf.config.get_logical_device_configuration(gpu) is not None:
                logger.info("%s has a limit, up to which it grows anyway", gpu.name)
                continue
            tf.config.experimental.set_memory_growth(gpu, growth)
        logger.info("memory growth %s on %d GPU(s)", "on" if growth else "off", len(gpus))


def arena_environment(limit_bytes: int) -> dict[str, str]:
    """Return the environment that limits a process's CPU memory, to be set before it imports TensorFlow.

    Operations run one at a time there, unless the environment of this process already says how many.
    """
    limit_mib = limit_bytes // MIB
    if limit_mib < 1:
        raise ValueError(f"A memory limit is at least 1 MiB, in steps of 1 MiB. Received: {limit_bytes!r} bytes")
    at_a_time = os.environ.get(_AT_A_TIME) or "1"
    return {_USE_BFC: "1", _LIMIT_MIB: str(limit_mib), _ONEDNN: "0", _AT_A_TIME: at_a_time}


def arena_limit_bytes(device: str | None = None) -> int | None:
    """Return the limit that this process was given on ``device`` ("GPU:0", "CPU:0"), in bytes; None if it has none.

    With ``device=None``, return the limit of the device that the process computes on. The environment variables are
    recognised, whether `limit_memory` or a person set them, and so are GPU logical devices.
    """
    tf = sys.modules.get("tensorflow")
    if tf is not None and (device is None or device.startswith("GPU")):
        index = 0 if device is None else int(device.partition(":")[2] or 0)
        limits = _logical_limits(tf)
        if limits:
            return limits[index] if index < len(limits) else None
    if device is not None and not device.startswith("CPU"):
        return None
    if os.environ.get(_USE_BFC, "").strip().lower() not in ("1", "true"):
        return None
    text = os.environ.get(_LIMIT_MIB, "").strip()
    return (int(text) if text.isdecimal() else _DEFAULT_LIMIT_MIB) * MIB


def reserve_in_one_piece() -> bool:
    """Let a limited CPU arena take what is left of it at once, as a GPU's allocator does; return True if it did.

    The arena grows in regions that double in size, and a tensor must lie within one region. So up to half of the limit
    would be lost at the ends of regions. Nothing is written to the memory, so none of the host's is really used. The
    arena is left as it is where the request would likely fail.
    """
    limit_bytes = arena_limit_bytes("CPU:0")
    if limit_bytes is None:
        return False
    tf = _import_tensorflow()
    # Regions add up to at most about twice what was ever held in them.
    free_bytes = limit_bytes - 2 * tf.config.experimental.get_memory_info("CPU:0")["peak"]
    if free_bytes <= limit_bytes // 2:
        return False
    # The next region is the smallest power of two that holds what is asked for, or all that is left: so a little more
    # than the largest power of two below what is left is enough.
    wanted_bytes = 2 ** (free_bytes.bit_length() - 1) + 1
    if wanted_bytes > free_bytes - MIB:
        wanted_bytes = wanted_bytes // 2 + 1
    try:
        with tf.device("CPU:0"):
            tf.raw_ops.Empty(shape=[-(-wanted_bytes // 2**10), 2**10], dtype=tf.uint8)
    except tf.errors.ResourceExhaustedError:  # the regions take more than the peak suggests
        return False
    return True


def devices_started() -> bool:
    """Return True if TensorFlow has started its devices: no limit can be set after that."""
    module = _eager_context()
    context = None if module is None else getattr(module, "_context", None)
    return bool(getattr(context, "_initialized", False))


def without_allocation_wait() -> bool:
    """Let a failed GPU allocation fail at once, not after TensorFlow's ten seconds; return True if that was set.

    Call it in a worker process before TensorFlow starts its devices. The switch is read when the devices start, and
    cannot be put back in the same process. A process that goes on to train must not use it: there the wait lets another
    stream or thread free memory in time. It has no effect on the CPU's allocators.
    """
    if devices_started():
        return False
    # The devices are listed first: else TensorFlow would take the configuration set below for one of its version 1.
    _import_tensorflow().config.get_visible_devices("GPU")
    module = _eager_context()
    make = getattr(module, "context", None)
    if make is None:
        return False
    context = make()
    if not hasattr(context, "_config"):
        logger.info("this TensorFlow hides its configuration: failed allocations keep their ten seconds of waiting")
        return False
    from tensorflow.core.protobuf import config_pb2

    config = config_pb2.ConfigProto()
    if context._config is not None:
        config.CopyFrom(context._config)
    if not hasattr(config.gpu_options.experimental, "disallow_retry_on_allocation_failure"):
        return False
    config.gpu_options.experimental.disallow_retry_on_allocation_failure = True
    context._config = config
    return True


def _require_not_started(function: str) -> None:
    if devices_started():
        raise RuntimeError(
            f"autobatch.{function} came too late: TensorFlow has started its devices, and their memory cannot be "
            f"configured after that. Call autobatch.{function} first thing in the program, before any tensor, variable "
            "or model is made; in a notebook, restart the kernel first."
        )


def _limit_gpus(limit_bytes: int) -> None:
    tf = _import_tensorflow()
    limit_mib = limit_bytes // MIB
    gpus = tf.config.get_visible_devices("GPU")
    for gpu in gpus:
        tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=limit_mib)])
    logger.info("%d GPU(s) limited to %s each", len(gpus), format_bytes(limit_mib * MIB))


def _logical_limits(tf: Any) -> list[int | None]:
    """Return the memory limit of each logical GPU, in the order of their names; empty if none was configured."""
    limits: list[int | None] = []
    configured = False
    for gpu in tf.config.get_visible_devices("GPU"):
        logical = tf.config.get_logical_device_configuration(gpu)
        configured = configured or logical is not None
        limits += [None] if logical is None else [_mib(part.memory_limit) for part in logical]
    return limits if configured else []


def _mib(memory_limit_mib: float | None) -> int | None:
    return None if memory_limit_mib is None else int(memory_limit_mib * MIB)


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _onednn_enabled() -> bool:
    try:
        from tensorflow.python.util import _pywrap_util_port
    except ImportError:
        return False
    return bool(getattr(_pywrap_util_port, "IsMklEnabled", lambda: False)())


def _eager_context() -> ModuleType | None:
    return sys.modules.get("tensorflow.python.eager.context")


def _import_tensorflow() -> Any:
    import tensorflow

    return tensorflow
