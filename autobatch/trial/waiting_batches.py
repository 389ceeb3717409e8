"""Batches that stand in for those which wait in the input queue while a trial runs."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf

from autobatch.memory import arena
from autobatch.trial.worst_case import Data
from autobatch.types import Tensor


class WaitingBatches:
    """Holder of as much memory, while trials run, as effective batches under way take from an arena in training.

    In a CPU's arena those batches share the memory that the steps need. On a GPU they wait on the host. Without an
    arena nothing is limited by what this process takes. So in these two cases nothing is held, nor where nothing is to
    be trained. What the user's own pipeline buffers is left out: it may be held already.
    """

    def __init__(self, batches: Data, device: str, *, target_batch: int | None) -> None:
        shared = target_batch is not None and device.startswith("CPU") and arena.arena_limit_bytes(device) is not None
        self._batches = batches if shared else None
        self._target_batch = target_batch or 0
        self.least_bytes = 0 if self._batches is None else self._batches.bytes_to_come(sys.maxsize)
        self._held: Any = None

    def hold(self, samples: int, sample_bytes: int = 0) -> None:
        """Hold the memory of the waiting batches beside a trial on ``samples`` samples, until the next trial.

        ``sample_bytes`` are the bytes of a sample that are kept for metrics until an effective batch is through.

        Raises:
            ResourceExhaustedError: It does not fit.
        """
        self.drop()
        size = 0
        if self._batches is not None:
            size = self._batches.bytes_to_come(samples) + max(0, self._target_batch - samples) * sample_bytes
        if size:
            with tf.device("CPU:0"):
                self._held = tf.zeros([size], tf.uint8)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that are held now."""
        return [] if self._held is None else [self._held]

    def drop(self) -> None:
        """Release the memory that is held: training may begin."""
        self._held = None
