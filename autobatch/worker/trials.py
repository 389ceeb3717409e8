"""Trials in a process of their own: the parent's side, which imports no TensorFlow.

A worker is spawned with the limit's arena in its environment and imports the user's code once. Parent and worker speak
over a pair of pipes of their own, in frames of JSON with a length in front. So nothing that the user's code prints can
get between: it goes to a file whose tail is read when the worker dies.

A worker may end by a segmentation fault, an abort, a kill or a hang. Its end is one trial's outcome if memory was the
cause by `memory.oom`, or if the time was up; the next trial then starts a new worker. Any other death is the user's to
know about. The worker leads a process group, which is killed as a whole; it ends by itself when the parent is gone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

from autobatch.errors import (
    CannotBeCutError,
    NoFeasibleBatchError,
    NotApplicableError,
    TargetError,
    UserCodeError,
    WorkerError,
)
from autobatch.memory import arena, oom
from autobatch.memory.visible_devices import visible_devices
from autobatch.record_codec import decode_record, encode
from autobatch.records import Environment, HostUse, Outcome, SampleEstimate, TrialRequest, TrialResult, Variant
from autobatch.units import format_bytes, parse_bytes
from autobatch.worker.messages import Message, Ready, decode_result
from autobatch.worker.process import WorkerDied, WorkerLate, WorkerProcess, exit_words

OPENER = "autobatch.opening:open_trials"
"""Function that the worker calls with the user's model and data; it returns a ``trial.protocol.Trials``."""

AS_IT_IS = Variant()


class WorkerTrials:
    """The trials of one target, each run in a worker process; implements ``trial.protocol.Trials``.

    Args:
        target: ``file.py:function``, ``package.module:function`` or ``keras:Name``.
        target_batch: the effective batch to plan for, None to look for the largest micro-batch.
        memory_limit: what the worker's device may use, in bytes or as text; None for what there is.
        headroom: share of the limit to be kept free, or bytes as an int.
        trial_timeout_seconds: seconds that building the model, and one trial, may take; None for ever.
        device: "CPU", "GPU" or "GPU:1"; None for TensorFlow's own choice.
        precision: a Keras dtype policy set before the target is called; None leaves it alone.
        jit_compile: XLA on or off; None leaves the model as it was compiled.
        variant: the model built or compiled in another way; goes before ``precision`` and ``jit_compile``.
        input_shape, classes: of a ``keras:Name`` target.
        strategy: "mirrored" calls the target under a MirroredStrategy over all devices; None leaves it alone.
        opener: for tests, another ``module:function`` in place of :data:`OPENER`.

    Raises:
        TargetError: the target cannot be used.
        UserCodeError: the target failed; the error has its traceback.
        NoFeasibleBatchError: there is not even room for the model.
        WorkerError: no worker could be started, or two workers built different models.
        NotApplicableError: the variant would change nothing, or cannot be made of this model.
    """

    def __init__(
        self,
        target: str,
        *,
        target_batch: int | None = None,
        memory_limit: int | str | None = None,
        headroom: float = 0.05,
        trial_timeout_seconds: float | None = 600.0,
        device: str | None = None,
        precision: str | None = None,
        jit_compile: bool | None = None,
        variant: Variant = AS_IT_IS,
        input_shape: tuple[int, ...] | None = None,
        classes: int = 1000,
        strategy: str | None = None,
        opener: str | None = None,
    ) -> None:
        if os.name != "posix":
            raise WorkerError("Trials in a worker process need Linux or macOS. On Windows, run autobatch under WSL2.")
        self._target = target
        self._timeout_seconds = trial_timeout_seconds
        self._limit_bytes = None if memory_limit is None else parse_bytes(memory_limit)
        self._environment = _worker_environment(self._limit_bytes, device)
        self._open_message = {
            "kind": "open",
            "target": target,
            "opener": opener or OPENER,
            "target_batch": target_batch,
            "memory_limit_bytes": self._limit_bytes,
            "headroom": headroom,
            "precision": precision,
            "jit_compile": jit_compile,
            "variant": encode(variant),
            "input_shape": None if input_shape is None else list(input_shape),
            "classes": classes,
            "strategy": strategy,
            "cannot_be_cut": "",
        }
        self._process: WorkerProcess | None = None
        self._warnings: tuple[str, ...] = ()
        self._ready = self._start()

    @property
    def replicas(self) -> int:
        return self._ready.replicas

    @property
    def samples_in_portion(self) -> int:
        return self._ready.samples_in_portion

    @property
    def takes_elements_whole(self) -> bool:
        return self._ready.takes_elements_whole

    @property
    def environment(self) -> Environment:
        return self._ready.environment

    @property
    def largest_useful(self) -> int | None:
        return self._ready.largest_useful

    @property
    def fixed_bytes_hint(self) -> int | None:
        return self._ready.fixed_bytes_hint

    @property
    def model_name(self) -> str:
        return self._ready.model_name

    @property
    def warnings(self) -> tuple[str, ...]:
        """Differences from the full batch where gradients are accumulated, as the last trial of a part has seen them.

        They are empty before such a trial.
        """
        return self._warnings

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings that were given when the model and the data were opened."""
        return self._ready.notes

    @property
    def host_uses(self) -> tuple[HostUse, ...]:
        return self._ready.host_uses

    @property
    def content(self) -> str:
        return self._ready.content

    @property
    def fingerprint(self) -> str:
        """Model's variables in short: equal for two models that are built alike."""
        return self._ready.fingerprint

    @property
    def rematerialised(self) -> tuple[str, ...]:
        """Names of the layers that the variant rematerialises."""
        return self._ready.rematerialised

    def estimate_sample(self) -> SampleEstimate | None:
        """Return what a sample needs; None if unknown, or if the worker died or was late: a trial will say why."""
        if self._process is None:
            self._restart()
        assert self._process is not None
        try:
            self._process.send({"kind": "estimate"})
            message = self._process.receive(self._deadline())
        except (WorkerLate, WorkerDied):
            self.kill()
            return None
        except BaseException:
            self.kill()
            raise
        if message["kind"] != "estimate":
            self._raise(message)
        fields = message["estimate"]
        return None if fields is None else decode_record(SampleEstimate, fields, "estimate")

    def run(self, request: TrialRequest) -> TrialResult:
        """Run one size; see ``trial.protocol.Trials``."""
        if self._process is None:
            self._restart()
        process = self._process
        assert process is not None
        try:
            process.send({"kind": "trial", "request": encode(request)})
            message = process.receive(self._deadline())
        except WorkerLate:
            self.kill()
            detail = f"did not finish within {self._timeout_seconds:g} s; the worker was ended"
            return TrialResult(request.micro_batch, Outcome.TIMED_OUT, detail=detail)
        except WorkerDied as death:
            return self._outcome_of_death(request, process, death.returncode)
        except BaseException:
            self.kill()  # an interrupt, above all: its reply would be taken for the next trial's
            raise
        if message["kind"] != "result":
            self._raise(message)
        if message["worker_ends"]:
            self.kill()
        if message["warnings"] is not None:
            self._warnings = tuple(message["warnings"])
        return decode_result(message["result"])

    def keep_whole(self, reason: str) -> None:
        """Take each element of the dataset for one effective batch, for this ``reason``, in a new worker."""
        self.kill()
        self._open_message["cannot_be_cut"] = reason
        self._ready = self._start()

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def kill(self) -> None:
        """End the worker and all that it has started, without waiting for its exit hooks."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def __enter__(self) -> WorkerTrials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _deadline(self) -> float | None:
        return None if self._timeout_seconds is None else time.monotonic() + self._timeout_seconds

    def _start(self) -> Ready:
        """Start a worker; return what it reports once it has built the model."""
        self._process = WorkerProcess(self._environment)
        try:
            return self._wait_until_ready(self._process)
        except BaseException:  # an interrupt, too, must leave no worker behind
            self.kill()
            raise

    def _wait_until_ready(self, process: WorkerProcess) -> Ready:
        deadline = self._deadline()
        loading = False
        try:
            process.send(self._open_message)
            while (message := process.receive(deadline))["kind"] == "loading":
                loading = True
        except WorkerLate:
            raise UserCodeError(
                f"{self._target} was not ready for its first trial after {self._timeout_seconds:g} s. "
                "If it only needs longer, raise the timeout.",
                traceback_text=process.stack_and_log(),
            ) from None
        except WorkerDied as death:
            raise self._death_at_start(process, death.returncode, loading) from None
        if message["kind"] != "ready":
            self._raise(message)
        return decode_record(Ready, message["ready"], "ready")

    def _restart(self) -> None:
        """Start a new worker, which must build the same model as the first."""
        ready = self._start()
        if ready.fingerprint != self._ready.fingerprint:
            self.kill()
            raise WorkerError(
                f"{self._target} does not build the same model each time: first {self._ready.fingerprint}, then "
                f"{ready.fingerprint}. Trials of different models cannot be compared; make it deterministic."
            )

    def _death_at_start(self, process: WorkerProcess, returncode: int, loading: bool) -> Exception:
        tail = process.log_tail()
        if not loading:
            return WorkerError(
                f"The worker process ended before it did anything ({exit_words(returncode)}). It said:\n{tail.strip()}"
            )
        diagnosis = oom.diagnose_exit(returncode, tail, arena=self._has_arena)
        if diagnosis.is_memory:
            return self._model_does_not_fit(diagnosis.requested_bytes, diagnosis.detail)
        return UserCodeError(
            f"{self._target} ended its process while the model was built ({exit_words(returncode)}).",
            traceback_text=tail,
        )

    def _outcome_of_death(self, request: TrialRequest, process: WorkerProcess, returncode: int) -> TrialResult:
        tail = process.log_tail()
        self.kill()
        diagnosis = oom.diagnose_exit(returncode, tail, arena=self._has_arena)
        if not diagnosis.is_memory:
            raise UserCodeError(
                f"The worker process ended in a trial of micro-batch {request.micro_batch} "
                f"({exit_words(returncode)}), and not for want of memory: {diagnosis.detail}",
                traceback_text=tail,
            )
        return TrialResult(
            request.micro_batch,
            Outcome.OUT_OF_MEMORY,
            requested_bytes=diagnosis.requested_bytes,
            detail=f"the worker process ended: {diagnosis.detail}",
        )

    def _model_does_not_fit(self, requested_bytes: int | None, detail: str) -> NoFeasibleBatchError:
        limit = "" if self._limit_bytes is None else f" into the limit of {format_bytes(self._limit_bytes)}"
        return NoFeasibleBatchError(
            f"The model itself does not fit{limit}: memory ran out while it was built, before the first trial "
            f"({detail}). Raise the memory limit or make the model smaller.",
            needed_bytes=requested_bytes,
            limit_bytes=self._limit_bytes,
        )

    def _raise(self, message: Message) -> None:
        """Raise the error that a message of failure reports, and end the worker that sent it."""
        self.kill()
        kind, text = message["kind"], message.get("message", "")
        if kind == "target_error":
            raise TargetError(text)
        if kind == "not_applicable":
            raise NotApplicableError(text)
        if kind == "cannot_be_cut":
            raise CannotBeCutError(message["reason"])
        if kind == "user_error":
            raise UserCodeError(text, traceback_text=message["traceback"])
        if kind == "memory_error":
            raise self._model_does_not_fit(message["requested_bytes"], text)
        if kind == "no_feasible_batch":
            raise NoFeasibleBatchError(
                text, needed_bytes=message["needed_bytes"], limit_bytes=message["limit_bytes"] or self._limit_bytes
            )
        raise WorkerError(f"The worker process sent a message of an unknown kind. Received: {kind!r}")

    @property
    def _has_arena(self) -> bool:
        return self._limit_bytes is not None or arena.arena_limit_bytes("CPU:0") is not None


def _worker_environment(limit_bytes: int | None, device: str | None) -> dict[str, str]:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1", **os.environ}
    # The worker must find this autobatch, wherever it was imported from; last, so that nothing of the user's is hidden.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    if limit_bytes is not None:
        environment |= arena.arena_environment(limit_bytes)
    if device is not None:
        environment |= visible_devices(device)
    return environment
