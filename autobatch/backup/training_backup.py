"""Backup of one training: what is kept, when it is written, and how a training goes on behind it.

A backup is taken between two steps of Keras's ``fit``, when the callbacks have seen the end of one. It holds everything
that decides what comes: weights, optimizer, statistics, metrics and seeds; the random states of Python, NumPy, torch
and TensorFlow; the epoch, the step and the logs so far; the callbacks' states; the place in the data and their order;
the micro-batch and what has failed; the report of the search.

A training that goes on is Keras's ``fit`` with ``initial_epoch``. In its first epoch the steps that were made are left
out, and everything is put back when the callbacks have been told that the epoch begins. So neither what they do at the
beginning of a training nor at that of an epoch counts twice.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from autobatch.backup import callback_states, fingerprint, own_parts, variables
from autobatch.backup.folder import BackupFolder
from autobatch.backup.identity import Identity
from autobatch.backup.processes import Processes
from autobatch.backup.settings import BackupSettings
from autobatch.backup.termination import Termination
from autobatch.backup.training_parts import Place, Training
from autobatch.backup.writer import Writer
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.data.effective_iterator import EffectiveIterator
from autobatch.data.random_states import RandomStates
from autobatch.errors import WorkerLostError, warn
from autobatch.handover.status import note_backup, note_backups_removed
from autobatch.records import Environment, Report
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.seams import fitting, random_states, versions
from autobatch.types import Model

LEAST_SHARE = 99
"""Times that training takes, at least, of the seconds in which it stands still for a backup: one in a hundred."""


class TrainingBackup:
    """Backup of one training, whose ``identity`` is compared with that of the backup in the folder.

    Of several ``processes`` the chief alone touches the folder. It goes on behind what it finds there, and all others
    with it.

    Raises:
        ValueError: the folder has a backup of other data, of another target, or of another number of replicas.
    """

    def __init__(self, settings: BackupSettings, identity: Identity, processes: Processes) -> None:
        self._settings = settings
        self._identity = identity
        self._processes = processes
        self._folder = BackupFolder(settings.folder)
        self._kept = kept = own_parts.kept_by_chief(self._folder, identity, processes)
        if kept is not None:
            processes.together(functools.partial(identity.require_same, kept), "the data of the backup")
            note_backup(kept["transaction"]["updates"], written=False)
        self._writer = Writer(self._folder)
        self._termination = Termination(self._before_leaving)
        self._of: Training | None = None
        self._model_identity: dict[str, str] | None = None
        self._epoch = 0
        self._place: Place | None = None
        self._place_behind: Callable[[], Place] | None = None
        """Returns the place behind the step that is under way."""
        self._between_steps = False
        self._held: dict[str, Any] | None = None
        self._said = False
        self._logs: Any = None
        self._validation: fitting.ValidationPasses | None = None
        self._logs_to_give: dict[str, Any] | None = None
        self._last_time = time.monotonic()
        self._last_update = 0
        self._stood_still = 0.0
        self._held_update = 0
        self._held_time = -math.inf
        self._held_for = 0.0

    def report_for(self, environment: Environment) -> Report | None:
        """Return the report that the training to go on with had, if it holds in this ``environment`` too.

        None if a new training begins, another micro-batch, limit or headroom was given, or the device is another.
        """
        found = None if self._kept is None else self._identity.report_for(self._kept, environment)
        known = self._processes.gather([float(found is not None)], "the report of the backup")
        return found if known.all() else None

    # -- around Keras's fit -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def training(
        self,
        model: Model,
        batches: EffectiveBatches,
        transaction: AnyTransaction,
        *,
        callbacks: list[Any],
        report: Report,
        options: dict[str, Any],
    ) -> Iterator[None]:
        """Enclose Keras's ``fit``: go on behind the kept update, keep others, and remove all when it is through.

        ``options`` are those of ``fit``; ``initial_epoch`` among them is set.

        Raises:
            ValueError: the backup is one of another model, or of a later epoch than the last one now; nothing has been
                changed.
        """
        self._of = of = Training(model, batches, transaction, callbacks, report)
        self._epoch, epochs = int(options.get("initial_epoch", 0)), int(options.get("epochs", 1))
        if self._kept is not None:
            self._identity.require_reached(self._kept, epochs)
            self._epoch = options["initial_epoch"] = self._kept["epoch"]
            prepare = functools.partial(self._prepare, of, self._kept)
            self._processes.together(prepare, "the model of the backup")
            if options.get("validation_steps") and (why := versions.why_validation_begins_anew()):
                warn(why)
        begun, read = (0, 0) if self._kept is None else self._kept.get("validation_passes", (0, 0))
        self._validation = fitting.ValidationPasses(model, (begun, read))
        self._last_time, self._last_update = time.monotonic(), transaction.updates
        if self._processes.count > 1:
            transaction.told = functools.partial(self._told, of)
        try:
            with (
                self._validation.counted(),
                fitting.epochs_enumerated(batches, self._enumerate),
                fitting.epoch_logs_of(model, self._give_logs, self._hold_if_stopped),
                self._termination.handled(),
            ):
                try:
                    yield
                    self._processes.together(lambda: None, "the end of the training")
                except WorkerLostError:
                    if self._held is not None:  # in the validation behind an epoch, say
                        self._writer.write_now(self._held_update, self._held)
                    raise
        finally:
            self._of = None
            self._writer.wait()
        if not self._settings.keep:
            if self._processes.index == 0:
                self._folder.remove()
            note_backups_removed()
        elif self._held is not None:
            self._writer.write_now(self._held_update, self._held)
        self._held = self._kept = None

    def _prepare(self, of: Training, kept: dict[str, Any]) -> None:
        of.transaction.trace()
        self._identity.require_same_model(kept, fingerprint.of_model(of.model))
        self._assign_variables(of, kept)
        of.transaction.continue_from(kept["transaction"])
        of.batches.continue_from(kept["position"])
        callback_states.warn_of_those_left_out(of.callbacks, kept["callbacks"])
        callback_states.prepare_callbacks(of.callbacks, kept["callbacks"])

    def _assign_variables(self, of: Training, kept: dict[str, Any]) -> None:
        missing = variables.missing(of.variables, kept["variables"])
        if missing:
            self._identity.refuse(f"another model: it holds {', '.join(missing)}, which this training does not have")
        variables.assign(of.variables, kept["variables"])

    def _hold_if_stopped(self) -> None:
        """Hold what is to be left, if a callback has stopped training behind a step: Keras asks for no other then."""
        of = self._of
        if self._settings.keep and of is not None and of.model.stop_training and self._place_behind is not None:
            self._place = self._place_behind()
            self._end_epoch()

    def _give_logs(self) -> dict[str, Any] | None:
        given, self._logs_to_give = self._logs_to_give, None
        return given

    # -- steps --------------------------------------------------------------------------------------------------------

    def run(self, once: Callable[[], Any]) -> Any:
        """Run one execution of Keras's train function; a signal to leave is answered behind it."""
        self._termination.begin_update()
        try:
            self._logs = once()
        except StopIteration:
            self._close_epoch()
            raise
        return self._logs

    def _enumerate(self, epoch_iterator: Any, steps: Iterator[Any]) -> Iterator[Any]:
        """Give the steps of an epoch, in the first behind those that were made; take backups between them."""
        epoch, self._epoch = self._epoch, self._epoch + 1
        self._place, made = None, 0
        kept, self._kept = self._kept, None
        if kept is not None:
            fitting.know_length(epoch_iterator, kept["length"])
            first = next(steps)
            fitting.count_earlier_steps(epoch_iterator, kept["earlier_steps"])
            steps, made = itertools.chain([first], steps), kept["steps"]
            self._go_on(kept, first[2])
            self._logs_to_give = kept["logs"]
        kept = first = None  # a copy of all variables
        for begin, end, iterator in steps:
            if begin < made:
                continue
            self._place_behind = functools.partial(Place.behind, epoch_iterator, epoch, end + 1, iterator)
            yield begin, end, iterator
            self._logs_to_give = self._held = None
            self._held_update = 0
            self._place = self._place_behind()
            self._behind_step()
        self._close_epoch()

    def _go_on(self, kept: dict[str, Any], iterator: EffectiveIterator) -> None:
        of = self._of
        assert of is not None
        self._assign_variables(of, kept)
        callback_states.restore_callbacks(of.callbacks, kept["callbacks"])
        iterator.begin()
        # Generators that the data have drawn from meanwhile were put where they belong, and go on by themselves.
        loader = of.batches.loader
        RandomStates.from_plain(kept["random"], loader).replay(of.batches.states_at_begin, loader)
        random_states.continue_eager_seeds(kept["seeds"])

    def _behind_step(self) -> None:
        of = self._of
        assert of is not None
        self._writer.say_what_failed()
        several, stops = self._processes.count > 1, of.model.stop_training
        due, asked = map(bool, of.transaction.heard) if several else (self._is_due(of.transaction.updates), False)
        if not stops and (due or asked):
            self._back_up(of)
        if not self._said:
            self._said = True
            of.warn_of_hidden_draws()
        if not several or (asked and not stops):
            self._answer_signal(of)

    def _answer_signal(self, of: Training) -> None:
        self._between_steps = self._processes.count == 1 and not of.model.stop_training
        try:
            self._termination.end_update()
        finally:
            self._between_steps = False
        if self._processes.count > 1:  # by itself one process could write no backup
            self._termination.begin_update()

    def _told(self, of: Training) -> list[float]:
        """Return what all processes hear of this one in an update: that a backup is due, and that it is to leave."""
        is_due = self._processes.index == 0 and self._is_due(of.transaction.updates + 1)
        return [float(is_due), float(self._termination.asked)]

    def _is_due(self, updates: int) -> bool:
        if self._settings.every_updates is not None:
            return updates - self._last_update >= self._settings.every_updates
        least = max(self._settings.every_seconds, LEAST_SHARE * self._stood_still)
        return time.monotonic() - self._last_time >= least and not self._writer.is_busy

    def _back_up(self, of: Training) -> None:
        begun = time.monotonic()
        self._last_update = of.transaction.updates
        others = own_parts.gathered(self._processes, of)
        if self._processes.index:
            note_backup(self._last_update)
        elif _host_has_room(of):
            self._writer.write_beside(self._last_update, self._state(others, copies=True))
        else:
            self._writer.write_now(self._last_update, self._state(others, copies=False))
        self._last_time = time.monotonic()
        self._stood_still = self._last_time - begun

    def _close_epoch(self) -> None:
        if self._processes.count == 1:
            self._termination.end_waiting()
            self._end_epoch()
        else:
            self._end_epoch()
            self._termination.end_update()

    def _end_epoch(self) -> None:
        """Hold what is not written yet, should a signal come before the next step: during validation, say.

        If the last backup is to be left, it is held at the end of each epoch: training may be stopped at any.
        """
        of, place, keep = self._of, self._place, self._settings.keep
        if of is None or place is None or of.transaction.updates in (self._last_update, self._held_update):
            return
        begun = time.monotonic()
        is_cheap = begun - self._held_time >= LEAST_SHARE * self._held_for
        holds = _host_has_room(of) and (is_cheap or keep)
        chiefs = self._processes.gather([float(holds), float(keep)], "the end of an epoch")[0]
        holds, keep = map(bool, chiefs)
        if not (holds or keep):
            return
        others = own_parts.gathered(self._processes, of)
        if holds:
            self._held_update = of.transaction.updates
            self._held = None if self._processes.index else self._state(others, copies=True)
            self._held_time = time.monotonic()
            self._held_for = self._held_time - begun
        else:
            self._last_update = of.transaction.updates
            if self._processes.index == 0:
                self._writer.write_now(self._last_update, self._state(others, copies=False))

    def _before_leaving(self) -> None:
        of = self._of
        if self._between_steps and of is not None and of.transaction.updates != self._writer.written:
            self._writer.write_now(of.transaction.updates, self._state([], copies=False))
        elif self._held is not None:
            self._writer.write_now(self._held_update, self._held)
        self._writer.wait()

    def _state(self, others: list[dict[str, Any]], *, copies: bool) -> dict[str, Any]:
        of, place = self._of, self._place
        assert of is not None
        assert place is not None
        if self._model_identity is None:
            self._model_identity = fingerprint.of_model(of.model)
        return {
            **self._identity.as_plain,
            "model": self._model_identity,
            "report": of.report.to_json(indent=None),
            "epoch": place.epoch,
            "steps": place.steps,
            "earlier_steps": place.earlier_steps,
            "length": place.length,
            "logs": callback_states.plain_copy(self._logs) if isinstance(self._logs, dict) else None,
            "variables": variables.values_of(of.variables, copies=copies, alike=of.alike),
            **own_parts.random_parts(of),
            own_parts.KEY: others,
            "transaction": of.transaction.as_plain(),
            "position": of.batches.position(place.iterator.taken),
            "validation_passes": (0, 0) if self._validation is None else self._validation.made,
        }


def _host_has_room(of: Training) -> bool:
    return of.host_has_room()
