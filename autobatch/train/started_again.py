"""Training in a process that ``autobatch run`` has started: it says how far it is, and begins as it was told.

What was told is read here and nowhere else. A process of several that train together begins as it did before: sizes and
data have to be alike in all of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from autobatch.data import economy
from autobatch.errors import WorkerLostError
from autobatch.handover.causes import Causes, told_causes
from autobatch.handover.status import Doing, note_device, note_doing, note_training, note_worker_lost
from autobatch.memory import arena
from autobatch.records import Recovery
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.recovery.out_of_memory import look_for_poison
from autobatch.seams import strategies
from autobatch.terminal import notices
from autobatch.trial.live_trials import LiveTrials
from autobatch.types import Model


@dataclass(frozen=True, slots=True)
class StartedAgain:
    """Causes that a training was told, and its number in this process."""

    causes: Causes
    number: int

    def lower_trials(self, trials: LiveTrials) -> None:
        """Note where the training computes; let no trial run a size that an earlier process died of."""
        on_cpu = trials.device.startswith("CPU")
        note_device(is_host=on_cpu, in_arena=on_cpu and arena.arena_limit_bytes(trials.device) is not None)
        deaths = self.causes.sizes(self.number, in_trials=True)
        if deaths:
            trials.died_at = min(deaths, key=lambda death: death.micro_batch or 0)

    def begin_smaller(self, transaction: AnyTransaction, *, effective_batch: int) -> None:
        """Let the training begin below each size that an earlier process died at, and say in a line what is changed.

        ``effective_batch`` is in samples of one replica.
        """
        deaths, economical = self.causes.deaths, bool(self.causes.host_deaths)
        sizes = self.causes.sizes(self.number, in_trials=False)
        if not deaths or not (sizes or economical):
            return
        before, known = transaction.micro_batch, len(transaction.recoveries)
        for death in sizes:
            transaction.begin_below(death.micro_batch or 1, death.doing, death.words, samples=effective_batch)
        if not sizes:
            transaction.recoveries.append(Recovery(transaction.updates, "restart", before, before, deaths[-1].words))
        first, last = transaction.recoveries[known], transaction.recoveries[-1]
        changed = []
        if first.micro_batch_before != last.micro_batch_after:
            changed.append(f"micro-batch {first.micro_batch_before} -> {last.micro_batch_after}")
        if economical:
            changed.append("short queues, few workers, no copy of arrays")
        if changed and (sizes or self.number == 1):  # what holds for all trainings is said before the first
            notices.tell(f"started again ({deaths[-1].words}): {', '.join(changed)}", level=logging.WARNING)


def told_to(model: Model) -> StartedAgain:
    """Begin another training of this process: return what it is told."""
    number, causes = note_training(), told_causes()
    strategy = strategies.strategy_of(model)
    is_one_of_several = strategy is not None and strategies.worker_of(strategy)[1] > 1
    return StartedAgain(Causes() if is_one_of_several or not number else causes, number)


@contextlib.contextmanager
def as_told(model: Model) -> Iterator[StartedAgain]:
    """Enclose one training of ``model``: it is economical if it was told so, and what poisons a device is noted."""
    again = told_to(model)
    with economy.economising(again.causes.host_deaths):
        try:
            yield again
        except WorkerLostError as error:
            if error.has_ended:
                note_worker_lost(str(error))
            raise
        except Exception as error:
            look_for_poison(error)
            raise
        finally:
            note_doing(Doing.ELSE)
