"""Transaction of several replicas: nobody enters the collective before all are known to have come that far.

A step has three parts. In the first, each replica of each worker works by itself, with no collective: it counts where
losses are masked or weighted, then it sums its gradients. This is where memory is likely to run out, and nobody waits
for the replica that it happened to. In the second, the workers exchange how it went. If it went well on all of them,
they reduce and update in the third. Otherwise all roll back, shrink alike, and run their parts of the same samples
again.

In one process nothing need be exchanged: an exception on any replica is seen by all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.errors import UpdateInterruptedError, WorkerLostError
from autobatch.memory import oom
from autobatch.metrics.merged_logs import Logs
from autobatch.recovery.abstract_transaction import AbstractTransaction
from autobatch.recovery.keeper import SavedState, SnapshotPlace
from autobatch.recovery.micro_batch_policy import evened
from autobatch.recovery.out_of_memory import CAUGHT
from autobatch.recovery.rolled_back import RolledBackError
from autobatch.replicas.agreement import SingleProcess
from autobatch.replicas.keeper import ReplicatedKeeper
from autobatch.replicas.lockstep import Phase, run_in_lockstep
from autobatch.replicas.step import ReplicatedStep
from autobatch.tensors.batch_structure import UnevenSpec, cut, in_words, rows_of
from autobatch.tensors.snapshots import SnapshotTaker
from autobatch.types import Batch, ElementSpec, Tensor


class ReplicatedTransaction(AbstractTransaction[ReplicatedStep]):
    """Transaction over the steps of one training under a strategy. ``micro_batch`` is that of one replica.

    ``effective_batch`` and the samples of a step count all replicas of all workers. Each worker is given all of them
    and takes its part.
    """

    def __init__(self, step: ReplicatedStep, micro_batch: int, *, agreement: SingleProcess, **options: Any) -> None:
        super().__init__(step, micro_batch, **options)
        self._agreement = agreement
        if not isinstance(self._keeper, ReplicatedKeeper):
            limit, share = self._user_limit_bytes, self._headroom
            self._keeper = ReplicatedKeeper(step, agreement, user_limit_bytes=limit, headroom=share)
        self._replicas = int(step.strategy.num_replicas_in_sync)
        self._without_counts: set[int] = set()  # ids of the steps whose denominators follow from the samples
        self._fitting_agreed: int | None = None
        self._metric_logs: dict[str, Any] | None = None

    def metrics_result(self) -> dict[str, Any] | None:
        """Return the metrics of all replicas after the last step; None before the first."""
        return self._metric_logs

    def as_plain(self) -> dict[str, Any]:
        logs = self._metric_logs
        return {
            **super().as_plain(),
            "metric_logs": None if logs is None else {name: np.asarray(value) for name, value in logs.items()},
        }

    def continue_from(self, plain: dict[str, Any]) -> None:
        super().continue_from(plain)
        self._metric_logs = plain.get("metric_logs")

    def _renew_now(self) -> None:
        super()._renew_now()
        self._without_counts = set()

    def renew_evaluation(self) -> None:
        super().renew_evaluation()
        self._without_counts = set()

    def trace(self) -> None:
        self._step.prepare()

    def _train_once(self, data: Batch, samples: int) -> Logs:
        step, micro_batch = self._step, self.policy.micro_batch
        kept: list[SavedState] = []

        def begin() -> None:
            if step.prepare():
                self._keeper.forget()
            kept.append(self._keeper.take(whole=False, proven=False))

        local = self._locally(step, data, samples, micro_batch, Phase.UPDATE, begin, step.accumulate, kept)
        logs = self._update(kept, local, samples)
        self._metric_logs = step.metric_logs
        return logs

    def _train_apart(self, data: Batch) -> Logs:
        raise ValueError(_cannot_be_shared(data))

    def _cut_like_training(self, data: Batch, element_spec: ElementSpec) -> Any:
        spec = super()._cut_like_training(data, element_spec)
        if isinstance(spec, UnevenSpec) and spec.rows is None:
            raise ValueError(_cannot_be_shared(data))
        return spec

    def _evaluate_once(self, step: ReplicatedStep, data: Batch, samples: int) -> Logs:
        micro_batch = self._validation_policy.micro_batch
        kept: list[SavedState] = []

        def begin() -> None:
            if step.prepare_evaluation() or "evaluation" not in step.recorders:
                step.recorders["evaluation"] = SnapshotTaker(step.changed_before_update)
            kept.append(SavedState(SnapshotPlace.NOWHERE, (step.recorders["evaluation"].take(),)))

        self._locally(step, data, samples, micro_batch, Phase.EVALUATION, begin, step.evaluate, kept)
        with self._agreement.waiting("the metrics of a validation batch"):
            logs = step.evaluation_logs()
        self._metric_logs = step.metric_logs
        return logs

    def _locally(
        self,
        step: ReplicatedStep,
        data: Batch,
        samples: int,
        micro_batch: int,
        moment: Phase,
        begin: Callable[[], None],
        run: Callable[..., Any],
        kept: list[SavedState],
    ) -> int:
        """Do all that needs no collective, on every worker; return the micro-batch that was run.

        Denominators that depend on the data are agreed on first. The first trace shows whether there are any.

        Raises:
            RolledBackError: Memory ran out on some worker; all are as before.
        """
        part, mark = self._part(step, data, samples)
        head = {
            "number of samples": float(samples),
            "first sample": mark,
            "micro-batch": float(micro_batch),
            "number of updates": float(self._updates),
        }

        # Evened for the largest share: a share with one sample less takes as many micro-batches, none of them larger.
        largest = self._samples_here(samples)
        micro_batch = evened(micro_batch, largest)

        def count() -> list[float]:
            begin()
            return list(step.count(part, micro_batch)) if step.counts_needed else []

        def work(totals: list[float]) -> list[float]:
            run(part, micro_batch, total=float(samples), totals=totals)
            return self.told() if moment is Phase.UPDATE else []

        def all_of_it() -> list[float]:
            begin()
            return work([])

        try:
            if id(step) in self._without_counts:
                heard = self._together(all_of_it, moment, head)
            else:
                totals = self._together(count, Phase.COUNT, head)
                if not step.counts_needed:
                    self._without_counts.add(id(step))
                heard = self._together(lambda: work(totals), moment, head)
        except RolledBackError as failure:
            self.roll_back(kept)
            raise RolledBackError(micro_batch, largest, failure.diagnosis) from None
        if moment is Phase.UPDATE:
            self.heard = heard
        return micro_batch

    def _update(self, kept: list[SavedState], local: int, samples: int) -> Logs:
        try:
            with self._agreement.waiting(f"update {self._updates}"):
                return self._step.apply()
        except WorkerLostError:
            raise
        except CAUGHT as error:
            diagnosis = oom.diagnose(error)
            self._agreement.give_up(f"its update failed: {diagnosis.detail}")
            if not diagnosis.is_memory:
                raise
            error.__traceback__ = None
        if kept[-1].weights_at is not SnapshotPlace.DEVICE:
            raise UpdateInterruptedError(
                f"The update ran out of memory half-way ({diagnosis.detail}), after the replicas had begun to add up "
                "their gradients. The weights are unusable now: load the last checkpoint, and use a smaller model, an "
                "optimizer with fewer slots, or devices with more memory."
            )
        self.roll_back(kept)
        raise RolledBackError(local, self._samples_here(samples), diagnosis)

    def _part(self, step: ReplicatedStep, data: Batch, samples: int) -> tuple[Any, float]:
        """Return this worker's samples of an effective batch, and a checksum of the batch's first sample.

        The checksum is 0 in a single process, and where the first leaf is ragged or sparse.
        """
        if self._agreement.count == 1:
            return data, 0.0
        leaves = step.structure.leaves(data)
        start, stop = self._agreement.share(samples)
        with tf.device("CPU:0"):
            first = leaves[0]
            seen = first[:1] if tf.is_tensor(first) and not isinstance(first, tf.SparseTensor) else None
            mark = 0.0 if seen is None or isinstance(seen, tf.RaggedTensor) else _mark_of(seen)
            bounds = tf.constant(start, tf.int64), tf.constant(stop, tf.int64)
            return step.structure.pack([cut(leaf, *bounds) for leaf in leaves]), mark

    def _together(self, work: Callable[[], list[float]], moment: Phase, same: dict[str, float]) -> list[float]:
        """Do this worker's ``work``; return the sums over the workers of the numbers that it gave.

        Raises:
            RolledBackError: Memory ran out on some worker.
        """
        what = f"{'validation after ' if moment is Phase.EVALUATION else ''}update {self._updates}"
        told = run_in_lockstep(self._agreement, work, moment, what, same, fitting_now=super()._fitting_now)
        if told.diagnosis is not None:
            self._fitting_agreed = told.fitting_now
            raise RolledBackError(0, 0, told.diagnosis)
        return [float(number) for number in told.rows.sum(axis=0)]

    def _fitting_now(self) -> int | None:
        return self._fitting_agreed

    def _samples_here(self, samples: int) -> int:
        return -(-samples // self._replicas)


def _cannot_be_shared(data: Batch) -> str:
    return (
        "The replicas of a strategy cannot share an element whose parts are not of the proportions of the others. "
        "Leave out what remains of a stream, by drop_remainder=True, or train on one device. The model holds the last "
        f"completed update. Received: parts of {in_words(rows_of(data))} rows"
    )


def _mark_of(sample: Tensor) -> float:
    """Return a number by which a sample can be told from others; it is the same on all workers."""
    return float(zlib.crc32(tf.io.serialize_tensor(sample).numpy()))
