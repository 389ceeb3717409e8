"""Batches that stand in for those which wait in the input queue while a trial runs."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf

from autobatch.memory import arena
from autobatch.trial.worst_case import Data


class WaitingBatches:
    """Holds, while trials run, as much as effective batches under way will take beside training's steps in an arena.

    In a CPU's arena they are in the memory that the steps need. On a GPU they wait on the host, and without an arena
    nothing is limited by what this process takes; so nothing is held then, nor where nothing is to be trained. What
    the user's own pipeline buffers is left out: it may be held already.
    """

    def __init__(self, batches: Data, device: str, *, target_batch: int | None) -> None:
        shared = target_batch is not None and device.startswith("CPU") and arena.arena_limit_bytes(device) is not None
        self._batches = batches if shared else None
        self._target_batch = target_batch or 0
        self.least_bytes = 0 if self._batches is None else self._batches.bytes_to_come(sys.maxsize)
        self._held: Any = None

    def hold(self, samples: int, sample_bytes: int = 0) -> None:
        """Hold it beside a trial on so many samples, until the next one.

        ``sample_bytes`` are those of a sample that are kept for metrics until an effective batch is through.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        self.drop()
        size = 0
        if self._batches is not None:
            size = self._batches.bytes_to_come(samples) + max(0, self._target_batch - samples) * sample_bytes
        if size:
            with tf.device("CPU:0"):
                self._held = tf.zeros([size], tf.uint8)

    def drop(self) -> None:
        """Hold it no longer: training may begin."""
        self._held = None
