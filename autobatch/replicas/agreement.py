"""Agreement of the workers of one training, with a timeout: each gives a few numbers, and all get all of them.

The numbers go through TensorFlow's own collectives. A collective that one worker never enters would keep the others
waiting for ever, so each wait is watched. After the timeout the collectives of this process are aborted. That ends the
wait here, and TensorFlow passes it on to the other workers. A worker whose process has died is found by TensorFlow's
own heartbeat, mostly within ten seconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.errors import WorkerLostError
from autobatch.memory import oom
from autobatch.seams import strategies
from autobatch.types import Strategy

TIMEOUT_SECONDS = 600.0
"""Seconds that a worker waits for the others: enough for one to trace and compile what another has ready."""


MOST_NUMBERS = 64
"""Length of the row that each worker gives. A worker that ran out of memory may not know its count of numbers."""


_OF_COLLECTIVES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class SingleProcess:
    """The agreement of one process with itself."""

    index, count = 0, 1

    def gather(self, numbers: list[float], what: str) -> Any:
        """Give ``numbers`` to all workers; return those of all, one row a worker."""
        return np.asarray([numbers], "float64")

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Watch nothing: a single process waits for no others."""
        yield

    def throughout(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Say by its name that a worker was lost where nobody watched a wait, while the context is open."""
        return contextlib.nullcontext()

    def give_up(self, message: str) -> None:
        """Let the other workers know that nothing more will come from this one."""

    def share(self, samples: int) -> tuple[int, int]:
        """Return the first of this worker's samples and the one after its last; ``samples`` is the count on all."""
        return 0, samples


class Workers(SingleProcess):
    """The agreement of the processes of a ``MultiWorkerMirroredStrategy``."""

    def __init__(self, strategy: Strategy, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._strategy = strategy
        self._timeout_seconds = timeout_seconds
        self.index, self.count = strategies.worker_of(strategy)
        self._gather_rows = tf.function(self._rows_of_all, autograph=False)

    def _rows_of_all(self, row: Any) -> Any:
        device = strategies.devices_of(self._strategy)

        def on_replica() -> Any:
            with tf.device(device[strategies.replica_here()]):
                own = tf.identity(row[None])
            return tf.distribute.get_replica_context().all_gather(own, axis=0)

        rows = self._strategy.experimental_local_results(self._strategy.run(on_replica))[0]
        return rows[:: len(device)]

    def gather(self, numbers: list[float], what: str) -> Any:
        if len(numbers) > MOST_NUMBERS:
            raise ValueError(
                f"At most {MOST_NUMBERS} numbers can be agreed on: use fewer masked or weighted losses in one model. "
                f"Received: {len(numbers)}"
            )
        padded = [*numbers, *[0.0] * (MOST_NUMBERS - len(numbers))]
        with self.waiting(what):
            return self._gather_rows(tf.constant(padded, tf.float64)).numpy()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Watch a wait for others in a collective while the context is open; abort it after the timeout.

        Raises:
            WorkerLostError: A worker died, failed, or did not come within the timeout.
        """
        timed_out = threading.Event()

        def abort() -> None:
            timed_out.set()
            strategies.abort_collectives(f"{what}: waited for {self._timeout_seconds:g} s")

        timer = threading.Timer(self._timeout_seconds, abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        except _OF_COLLECTIVES as error:
            if isinstance(error, tf.errors.InternalError) and oom.diagnose(error).is_memory:
                raise
            raise self._lost(what, error, timed_out=timed_out.is_set()) from None
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def throughout(self, what: str) -> Iterator[None]:
        # Keras's fit has collectives of its own: to set a metric to zero is one.
        try:
            yield
        except _OF_COLLECTIVES as error:
            if "ollective" not in str(error):
                raise
            raise self._lost(what, error, timed_out=False) from None

    def _lost(self, what: str, error: tf.errors.OpError, *, timed_out: bool) -> WorkerLostError:
        silent = strategies.unreachable_peers(self._strategy)
        who = " and ".join(silent) if silent else "another worker"
        happened = f"did not answer within {self._timeout_seconds:g} s" if timed_out else "is lost"
        lines = str(error.message).splitlines()
        reason = next((line for line in lines if "aborted" in line), lines[-1] if lines else "no message")
        lost = WorkerLostError(
            f"{who[0].upper()}{who[1:]} {happened}, while the workers agreed on {what}. The model holds the last "
            "completed update, and this process cannot take part in another one: start all workers again. With "
            'backup="runs/a" they go on behind the last update that was kept. '
            f"Received: {reason.strip()[:300]}"
        )
        lost.has_ended = not timed_out
        return lost

    def give_up(self, message: str) -> None:
        strategies.abort_collectives(f"worker {self.index}: {message}")

    def share(self, samples: int) -> tuple[int, int]:
        return samples * self.index // self.count, samples * (self.index + 1) // self.count


def agreement_for(strategy: Strategy, timeout_seconds: float | None = None) -> SingleProcess:
    """Return the agreement between the processes of ``strategy``."""
    if strategy is None or strategies.worker_of(strategy)[1] == 1:
        return SingleProcess()
    return Workers(strategy, TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds)
