"""One piece of local work on every worker, and the exchange of its outcome.

Running out of memory on one worker becomes a value that all of them get, so that all roll back and shrink alike. An
error of the user's own on one worker ends the others with an error that says where to look.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autobatch.errors import WorkerLostError, WorkersDisagreeError
from autobatch.memory import oom
from autobatch.recovery.out_of_memory import CAUGHT
from autobatch.replicas.agreement import SingleProcess

ELSEWHERE = "another worker ran out of memory"
PLACE = "place in the training"
"""Name of the first value that must be equal on all workers: the phase."""


class Phase(enum.IntEnum):
    """Part of a training in which the workers agree. All of them must be in the same one."""

    COUNT = 1
    UPDATE = 2
    EVALUATION = 3
    TRIAL = 4
    BEGIN = 5
    BACKUP = 6


class Status(enum.IntEnum):
    """End of one worker's local work."""

    FINE = 0
    OUT_OF_MEMORY = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class WorkerMessage:
    """One worker's account of its local work, sent to all as a row of numbers.

    ``same`` holds, by name, what must be equal on all workers. ``fitting_now`` and ``requested_bytes`` are None unless
    memory ran out, and where they are unknown. ``numbers`` is what the work returned.
    """

    same: dict[str, float]
    status: Status = Status.FINE
    fitting_now: int | None = None
    requested_bytes: int | None = None
    numbers: tuple[float, ...] = ()

    def to_row(self) -> list[float]:
        known = (-1.0 if number is None else float(number) for number in (self.fitting_now, self.requested_bytes))
        return [*self.same.values(), float(self.status), *known, *self.numbers]

    @classmethod
    def from_row(cls, row: Any, names: Sequence[str], count: int) -> WorkerMessage:
        """Read the row of a message with these ``names`` in ``same`` and ``count`` numbers; it may be longer.

        A worker in another phase has other names. Only the place in the training is then read correctly from its row,
        and anything may stand where the status is looked for.
        """
        values = [float(value) for value in row]
        place = len(names)
        status, *known = values[place : place + 3]
        fitting_now, requested_bytes = (int(number) if number >= 0 else None for number in known)
        return cls(
            same=dict(zip(names, values, strict=False)),
            status=next((each for each in Status if each == status), Status.FINE),
            fitting_now=fitting_now,
            requested_bytes=requested_bytes,
            numbers=tuple(values[place + 3 : place + 3 + count]),
        )


@dataclass(frozen=True, slots=True)
class SharedOutcome:
    """Outcome of one piece of work on all workers, the same on each of them.

    ``rows`` holds the numbers that each worker's work returned, one row a worker. ``diagnosis`` is None unless memory
    ran out on a worker; ``fitting_now`` is then the smallest micro-batch that such a worker expects to fit.
    """

    rows: Any
    diagnosis: oom.Diagnosis | None = None
    fitting_now: int | None = None


@dataclass(frozen=True, slots=True)
class _LocalOutcome:
    numbers: tuple[float, ...] = ()
    diagnosis: oom.Diagnosis | None = None
    error: Exception | None = None

    @property
    def status(self) -> Status:
        if self.error is not None:
            return Status.FAILED
        return Status.FINE if self.diagnosis is None else Status.OUT_OF_MEMORY


def run_in_lockstep(
    agreement: SingleProcess,
    work: Callable[[], list[float]],
    phase: Phase,
    what: str,
    same: dict[str, float],
    *,
    fitting_now: Callable[[], int | None] = lambda: None,
) -> SharedOutcome:
    """Do this worker's ``work``, then exchange with all workers how it went.

    Args:
        agreement: The workers to agree with.
        work: Returns the same count of numbers on each worker.
        phase, what: The place in the training, to be compared and in words.
        same: What must be the same on all workers, by name.
        fitting_now: Returns the micro-batch that this worker expects to fit; called where memory ran out.

    Raises:
        WorkerLostError: A worker died, hangs, or had an error of its own.
        WorkersDisagreeError: A value that must be the same on all workers is not.
    """
    own = _run_locally(work)
    fitting = None if own.diagnosis is None else fitting_now()
    if agreement.count == 1:
        if own.error is not None:
            raise own.error
        return SharedOutcome(agreement.gather(list(own.numbers), what), own.diagnosis, fitting)
    requested = None if own.diagnosis is None else own.diagnosis.requested_bytes
    message = WorkerMessage({PLACE: float(phase), **same}, own.status, fitting, requested, own.numbers)
    rows = agreement.gather(message.to_row(), what)
    if own.error is not None:
        raise own.error
    messages = [WorkerMessage.from_row(row, list(message.same), len(own.numbers)) for row in rows]
    _require_no_failure(messages, what)
    _require_same(messages, what)
    return _joined(messages, own.diagnosis)


def _run_locally(work: Callable[[], list[float]]) -> _LocalOutcome:
    try:
        return _LocalOutcome(tuple(work()))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised again once the others know
        diagnosis = oom.diagnose(error) if isinstance(error, CAUGHT) else None
        if diagnosis is None or not diagnosis.is_memory:
            return _LocalOutcome(error=error)
        error.__traceback__ = None  # it keeps the failed step's tensors alive
    return _LocalOutcome(diagnosis=diagnosis)


def _require_no_failure(messages: Sequence[WorkerMessage], what: str) -> None:
    failed = [str(index) for index, message in enumerate(messages) if message.status is Status.FAILED]
    if failed:
        workers = " and ".join(failed)
        raise WorkerLostError(
            f"An error of its own ended worker {workers} in {what}; it reports it itself. The model holds the last "
            "completed update. Mend what is wrong there and start all workers again. "
            f"Received: failure on worker {workers}"
        )


def _require_same(messages: Sequence[WorkerMessage], what: str) -> None:
    for name, expected in messages[0].same.items():
        found = [message.same[name] for message in messages]
        if any(value != expected for value in found):
            values = ", ".join(f"worker {index}: {value:.10g}" for index, value in enumerate(found))
            raise WorkersDisagreeError(
                f"The workers differ in the {name} at {what}. Give every worker the same data in the same order (a "
                "shuffle needs the same seed everywhere: call keras.utils.set_random_seed on each, or pass "
                f"shuffle=False) and the same arguments. Received: {values}"
            )


def _joined(messages: Sequence[WorkerMessage], own: oom.Diagnosis | None) -> SharedOutcome:
    """Join what all workers sent. Nothing but the words of the diagnosis may differ from one worker to another."""
    if all(message.status is Status.FINE for message in messages):
        return SharedOutcome(np.asarray([message.numbers for message in messages], "float64"))
    sizes = [message.fitting_now for message in messages if message.fitting_now is not None]
    asked_for = [message.requested_bytes for message in messages if message.requested_bytes is not None]
    diagnosis = oom.Diagnosis(
        oom.FailureKind.DEVICE if own is None else own.kind,
        max(asked_for, default=None),
        ELSEWHERE if own is None else own.detail,
    )
    return SharedOutcome(np.empty((len(messages), 0)), diagnosis, min(sizes, default=None))
