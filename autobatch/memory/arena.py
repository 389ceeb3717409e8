"""Gives a process a limit on its device memory, on a GPU or on the CPU, before TensorFlow starts its devices.

On a GPU the limit is TensorFlow's own logical device. On the CPU it is the allocator class that the GPU uses (BFC),
which TensorFlow puts in front of the CPU's when three environment variables ask for it; running out in it raises the
same ``ResourceExhaustedError``, so it is also how running out of memory is tested without a GPU.

What is private in TensorFlow and touched here: ``tensorflow.python.eager.context`` (``context_safe``, ``_initialized``,
``_config``), seen in 2.19 to 2.21. Where it is missing, only speed and an early error message are lost.
"""

from __future__ import annotations

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
_DEFAULT_LIMIT_MIB = 2**16  # what TensorFlow takes where the BFC allocator is asked for and no limit is given


def limit_memory(limit: int | str) -> None:
    """Let this process use at most ``limit`` bytes of device memory; call it before TensorFlow starts its devices.

    With GPUs, each one that is visible becomes a logical device of this size. Without, TensorFlow's tensors on the
    CPU live in a limited arena. Call it before ``import tensorflow`` or ``import keras`` where you can: on the CPU,
    TensorFlow decides while it is imported whether to use oneDNN, whose convolutions crash in a full arena (an
    `AutobatchWarning` then says so).

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
    try:
        gpus = _import_tensorflow().config.get_visible_devices("GPU")
    except BaseException:
        _restore(before)
        raise
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
        limit: the most that each GPU may give this process, in bytes or as text; None for no limit. See
            `limit_memory`, which also limits the CPU; this function leaves the CPU alone.

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
    """Return the environment that limits a process's CPU memory, to be set before it imports TensorFlow."""
    limit_mib = limit_bytes // MIB
    if limit_mib < 1:
        raise ValueError(f"A memory limit is at least 1 MiB, in steps of 1 MiB. Received: {limit_bytes!r} bytes")
    return {_USE_BFC: "1", _LIMIT_MIB: str(limit_mib), _ONEDNN: "0"}


def arena_limit_bytes(device: str | None = None) -> int | None:
    """Return the limit that this process was given on ``device`` ("GPU:0", "CPU:0"; None: whichever it computes on).

    Recognises the environment variables, set by `limit_memory` or by hand, and GPU logical devices. None: no limit.
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
    """Let a limited CPU arena take what is left of it at once, as a GPU's allocator does; return whether it did.

    The arena grows in regions that double, and a tensor must lie within one: up to half of the limit would be lost to
    the seams. Nothing is written to the memory, so that none is really used. Asking is left out where it would
    likely fail.
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
    except tf.errors.ResourceExhaustedError:  # more of it is taken than what was held tells
        return False
    return True


def devices_started() -> bool:
    """Whether TensorFlow has started its devices, after which no limit can be set any more."""
    module = _eager_context()
    context = None if module is None else getattr(module, "_context", None)
    return bool(getattr(context, "_initialized", False))


def without_allocation_wait() -> bool:
    """Let a failed GPU allocation fail at once, not after TensorFlow's ten seconds; return whether that was set.

    To be called in a worker process before TensorFlow starts its devices. The switch is read when the devices start
    and cannot be put back in the same process, so a process that goes on to train must leave it alone: there the wait
    lets another stream or thread free memory in time. It has no effect on the CPU's allocators.
    """
    if devices_started():
        return False
    # Looked up first, so that TensorFlow does not take the configuration set below for one of its version 1.
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
    """The memory limit of each logical GPU, in the order of their names; empty where none was configured."""
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
