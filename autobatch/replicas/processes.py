"""Bytes and numbers that the processes of one training give each other beside its updates: those of a backup.

Bytes travel as int64 through TensorFlow's own collectives, in pieces of a few sizes, so that few functions are traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from autobatch.errors import NoFeasibleBatchError
from autobatch.replicas.agreement import SingleProcess
from autobatch.replicas.all_reduce import all_reduce
from autobatch.replicas.lockstep import Phase, run_in_lockstep
from autobatch.seams import strategies
from autobatch.types import Strategy

T = TypeVar("T")

LARGEST_PIECE, SMALLEST_PIECE = 1 << 20, 1 << 12
"""Bytes that travel at a time."""


class OneProcess:
    """The one process of a training on one device, or on several of one machine."""

    index, count = 0, 1

    def __init__(self, replicas: int = 1) -> None:
        self.replicas = replicas

    def together(self, work: Callable[[], T], what: str) -> T:
        """Return what ``work`` returns here; an error of any process ends all of them."""
        return work()

    def gather(self, numbers: list[float], what: str) -> Any:
        """Give numbers to all processes; return those of all, one row a process."""
        return np.asarray([numbers], "float64")

    def from_chief(self, data: bytes, what: str) -> bytes:
        """Return the ``data`` of the first process."""
        return data

    def of_each(self, data: bytes, what: str) -> list[bytes]:
        """Return the ``data`` of each process."""
        return [data]


class SeveralProcesses(OneProcess):
    """The processes of a ``MultiWorkerMirroredStrategy``."""

    def __init__(self, strategy: Strategy, agreement: SingleProcess) -> None:
        super().__init__(int(strategy.num_replicas_in_sync))
        self.index, self.count = agreement.index, agreement.count
        self._strategy = strategy
        self._agreement = agreement
        self._devices = strategies.devices_of(strategy)
        self._first = tf.function(lambda row: self._on_replicas(self._chiefs, row), autograph=False)
        self._all = tf.function(lambda row: self._on_replicas(self._of_all, row), autograph=False)

    def together(self, work: Callable[[], T], what: str) -> T:
        results: list[T] = []

        def local() -> list[float]:
            results.append(work())
            return []

        outcome = run_in_lockstep(self._agreement, local, Phase.BACKUP, what, {})
        if outcome.diagnosis is not None:
            raise NoFeasibleBatchError(f"Memory ran out in {what}: {outcome.diagnosis.detail}. Free memory there.")
        return results[0]

    def gather(self, numbers: list[float], what: str) -> Any:
        return run_in_lockstep(self._agreement, lambda: numbers, Phase.BACKUP, what, {}).rows

    def from_chief(self, data: bytes, what: str) -> bytes:
        size = int(self.gather([float(len(data))], what)[0, 0])
        own = data if self.index == 0 else bytes(size)
        pieces = [self._sent(self._first, piece, what)[0] for piece in _pieces(own, size)]
        return b"".join(pieces)[:size]

    def of_each(self, data: bytes, what: str) -> list[bytes]:
        sizes = [int(size) for size in self.gather([float(len(data))], what)[:, 0]]
        sent = [self._sent(self._all, piece, what) for piece in _pieces(data, max(sizes))]
        return [b"".join(pieces[worker] for pieces in sent)[:size] for worker, size in enumerate(sizes)]

    def _sent(self, function: Callable[[Any], Any], piece: bytes, what: str) -> list[bytes]:
        with self._agreement.waiting(what):
            rows = function(tf.constant(np.frombuffer(piece, np.int64))).numpy()
        return [row.tobytes() for row in rows]

    def _on_replicas(self, gather: Callable[[Any, str], Any], row: Any) -> Any:
        def on_replica() -> Any:
            device = self._devices[strategies.replica_here()]
            with tf.device(device):
                return gather(tf.identity(row[None]), device)

        return self._strategy.experimental_local_results(self._strategy.run(on_replica))[0]

    def _chiefs(self, own: Any, device: str) -> Any:
        leads = self.index == 0 and strategies.replica_here() == 0
        return all_reduce([own if leads else tf.zeros_like(own)], device)[0]

    def _of_all(self, own: Any, device: str) -> Any:
        return tf.distribute.get_replica_context().all_gather(own, axis=0)[:: len(self._devices)]


def _pieces(data: bytes, size: int) -> list[bytes]:
    """Return ``data``, filled up to at least ``size``, in pieces of the same length, a power of two."""
    length = SMALLEST_PIECE
    while length < min(size, LARGEST_PIECE):
        length *= 2
    return [data[begin : begin + length].ljust(length, b"\0") for begin in range(0, size, length)]
