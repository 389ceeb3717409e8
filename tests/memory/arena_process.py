"""One scenario of limiting memory in a process of its own; prints what it saw as JSON.

python arena_process.py first         limit_memory before TensorFlow is imported
python arena_process.py after_import  limit_memory after Keras was imported, then out of memory for real
python arena_process.py by_hand       started under the environment variables
python arena_process.py no_limit      nothing limited, oneDNN as it comes
python arena_process.py no_count      nothing limited, oneDNN off: an allocator without statistics
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings

from autobatch.memory import arena, held_blocks, limits, oom

MIB = 2**20
seen: dict[str, object] = {}


def raised(function, *args: object) -> list[str]:
    try:
        function(*args)
    except (RuntimeError, ValueError, TypeError) as error:
        return [type(error).__name__, str(error)]
    return []


def note_statistics(tf) -> None:
    seen["arena"] = arena.arena_limit_bytes()
    tensor = tf.zeros([MIB])  # 4 MiB
    seen["in_use"] = limits.bytes_in_use("CPU:0")
    seen["peak"] = limits.peak_bytes("CPU:0")
    del tensor
    limits.reset_peak("CPU:0")
    seen["peak_after_reset"] = limits.peak_bytes("CPU:0")
    seen["wrong_device"] = raised(limits.peak_bytes, "CPU:7")
    seen["limit"] = limits.find_limit("CPU:0").limit_bytes
    seen["enforced"] = limits.find_limit("CPU:0").enforced


def note_what_lies_in_the_middle(tf) -> None:
    """Note whether a large block finds room where a variable was made in the middle of the arena."""
    from autobatch.trial import laid_anew

    def has_room(mib: int) -> bool:
        try:
            tf.zeros([mib * MIB], tf.uint8)
        except tf.errors.ResourceExhaustedError:
            return False
        return True

    assert has_room(33)  # the arena's last region
    below = tf.zeros([24 * MIB], tf.uint8)
    variable = tf.Variable(tf.ones([2 * MIB]))
    del below
    seen["room_beside_it"] = has_room(30)
    laid_anew.lay_anew([variable], "CPU:0")
    seen["room_when_laid_anew"] = has_room(30)
    filling = tf.zeros([30 * MIB], tf.uint8)
    before = limits.bytes_in_use("CPU:0")
    laid_anew.lay_anew([variable], "CPU:0")  # there is not room enough
    seen["value_kept"] = bool((variable.numpy() == 1.0).all()) and limits.bytes_in_use("CPU:0") == before
    del filling
    sizes = (200, 3 * MIB // 2, 7 * MIB // 4)
    small, large, larger = variables = [tf.Variable(tf.ones([size])) for size in sizes]

    def place() -> int:
        return next(iter(held_blocks.addresses_of([small], "CPU:0")))

    blocks = []
    while limits.bytes_in_use("CPU:0") < 58 * MIB:
        blocks.append(tf.zeros([2 * MIB], tf.uint8))
    del blocks[::2]  # much is free, and none of it in a piece that the large ones fit into
    was_at, tried, copy = place(), [], laid_anew._copy_in_a_gap

    def noted_copy(value, *args):
        tried.append(sizes.index(int(value.shape[0])))
        return copy(value, *args)

    laid_anew._copy_in_a_gap = noted_copy
    laid_anew.lay_anew([larger, large, small], "CPU:0")
    laid_anew._copy_in_a_gap = copy
    seen["tried_until_a_failure"] = tried
    seen["moved_before_it"] = place() != was_at
    seen["values_kept"] = all(bool((each.numpy() == 1.0).all()) for each in variables)


def too_late() -> None:
    before = dict(os.environ)
    seen["started"] = arena.devices_started()
    seen["too_late"] = raised(arena.limit_memory, "64MiB")
    seen["too_late_to_configure"] = raised(arena.configure_memory)
    seen["too_late_not_to_wait"] = arena.without_allocation_wait()
    seen["environment_kept"] = dict(os.environ) == before


def first() -> None:
    seen["bad"] = raised(arena.limit_memory, "0.9MiB")
    seen["environment_after_bad"] = arena.arena_limit_bytes()
    arena.limit_memory("64.9MiB")
    seen["started_by_limit"] = arena.devices_started()
    seen["no_wait"] = arena.without_allocation_wait()
    import tensorflow as tf

    seen["onednn"] = arena._onednn_enabled()
    seen["default_device"] = limits.default_device()
    seen["still_not_started"] = not arena.devices_started()
    note_statistics(tf)
    note_what_lies_in_the_middle(tf)
    options = tf.compat.v1.ConfigProto.FromString(context_config())
    seen["retry_disallowed"] = options.gpu_options.experimental.disallow_retry_on_allocation_failure
    too_late()


def context_config() -> bytes:
    from tensorflow.python.eager import context

    return context.context().config.SerializeToString()


def after_import() -> None:
    import keras
    import tensorflow as tf

    seen["keras"] = bool(keras.__version__)
    seen["started_by_import"] = arena.devices_started()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arena.limit_memory(64 * MIB)
    seen["warnings"] = [[type(each.message).__name__, str(each.message), each.filename] for each in caught]
    try:
        tf.zeros([20 * MIB])
    except tf.errors.ResourceExhaustedError as error:
        diagnosis = oom.diagnose(error)
        seen["failure"] = [diagnosis.kind.value, diagnosis.requested_bytes, diagnosis.detail]
    note_statistics(tf)


def no_limit() -> None:
    with_log = logging.getLogger("autobatch.memory.arena")
    with_log.setLevel(logging.INFO)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())
    with_log.addHandler(handler)
    arena.configure_memory()
    arena.configure_memory(limit="1GiB")
    seen["configure_log"] = lines
    seen["configure_bad"] = [raised(arena.configure_memory, "yes"), raised(arena.configure_memory, True, 5)]
    import tensorflow as tf

    seen["started_by_configure"] = arena.devices_started()
    note_statistics(tf)


if __name__ == "__main__":
    {"first": first, "after_import": after_import, "no_limit": no_limit}[sys.argv[1]]()
    json.dump(seen, sys.stdout)
