"""Work that every worker does by itself, and what all of them learn of how it went.

Running out of memory on one worker is a value here that all get, so that all roll back and shrink alike. An error of
the user's own on one worker ends the others with an error that says where to look.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autobatch.errors import WorkerLostError, WorkersDisagreeError
from autobatch.memory import oom
from autobatch.recovery.out_of_memory import CAUGHT
from autobatch.replicas.agreement import SingleProcess

ELSEWHERE = "another worker ran out of memory"


class Phase(enum.IntEnum):
    """Where in a training an agreement is; all workers must be at the same place."""

    COUNT = 1
    UPDATE = 2
    EVALUATION = 3
    TRIAL = 4
    BEGIN = 5


class _Status(enum.IntEnum):
    FINE = 0
    OUT_OF_MEMORY = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Told:
    """What all workers know now.

    ``rows`` holds the numbers that each worker's work gave, one row a worker. ``diagnosis`` tells that memory ran out
    on some worker; ``fitting_now`` is then the smallest micro-batch that one of those holds to fit.
    """

    rows: Any
    diagnosis: oom.Diagnosis | None = None
    fitting_now: int | None = None


def together(
    agreement: SingleProcess,
    work: Callable[[], list[float]],
    moment: Phase,
    what: str,
    same: dict[str, float],
    *,
    fitting_now: Callable[[], int | None] = lambda: None,
) -> Told:
    """Do this worker's ``work``, then learn how it went on all.

    Args:
        agreement: with whom.
        work: returns as many numbers on each worker.
        moment, what: where in the training this is, for the comparison and in words.
        same: what must be the same on all workers, by name.
        fitting_now: asked where memory ran out.

    Raises:
        WorkerLostError: a worker died, hangs, or had an error of its own.
        WorkersDisagreeError: what must be the same is not.
    """
    raised: BaseException | None = None
    diagnosis: oom.Diagnosis | None = None
    gave: list[float] = []
    try:
        gave = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the others are told, and then it is raised again
        found = oom.diagnose(error) if isinstance(error, CAUGHT) else None
        if found is not None and found.is_memory:
            diagnosis = found
            error.__traceback__ = None  # it keeps the failed step's tensors alive
        else:
            raised = error
    fitting = None if diagnosis is None else fitting_now()
    if agreement.count == 1:
        if raised is not None:
            raise raised
        return Told(agreement.tell(gave, what), diagnosis, fitting)
    status = _Status.FAILED if raised else _Status.OUT_OF_MEMORY if diagnosis else _Status.FINE
    head = {"place in the training": float(moment), **same}
    requested = None if diagnosis is None else diagnosis.requested_bytes
    news = [float(status), *(-1.0 if number is None else float(number) for number in (fitting, requested))]
    rows = agreement.tell([*head.values(), *news, *gave], what)
    if raised is not None:
        raise raised
    place = len(head)
    statuses = rows[:, place]
    if (statuses == _Status.FAILED).any():
        failed = " and ".join(str(index) for index in (statuses == _Status.FAILED).nonzero()[0])
        raise WorkerLostError(
            f"An error of its own ended worker {failed} in {what}; it reports it itself. The model holds the last "
            "completed update. Mend what is wrong there and start all workers again. "
            f"Received: failure on worker {failed}"
        )
    for column, name in enumerate(head):
        if (rows[:, column] != rows[0, column]).any():
            values = ", ".join(f"worker {index}: {value:.10g}" for index, value in enumerate(rows[:, column]))
            raise WorkersDisagreeError(
                f"The workers differ in the {name} at {what}. Give every worker the same data in the same order (a "
                "shuffle needs the same seed everywhere: call keras.utils.set_random_seed on each, or pass "
                f"shuffle=False) and the same arguments. Received: {values}"
            )
    if not (statuses == _Status.OUT_OF_MEMORY).any():
        return Told(rows[:, place + len(news) : place + len(news) + len(gave)])
    # What all go by from here on must be the same for all: a search takes what was asked for into account.
    sizes = [int(number) for number in rows[:, place + 1] if number >= 0]
    asked_for = [int(number) for number in rows[:, place + 2] if number >= 0]
    return Told(
        rows[:, :0],
        oom.Diagnosis(
            oom.Kind.DEVICE if diagnosis is None else diagnosis.kind,
            max(asked_for, default=None),
            ELSEWHERE if diagnosis is None else diagnosis.detail,
        ),
        min(sizes, default=None),
    )
