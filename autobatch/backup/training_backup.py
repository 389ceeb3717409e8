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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autobatch.backup import callback_states, fingerprint, variables
from autobatch.backup.folder import BackupFolder
from autobatch.backup.settings import BackupSettings
from autobatch.backup.termination import Termination
from autobatch.backup.writer import Writer
from autobatch.data import host_memory
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.data.effective_iterator import EffectiveIterator
from autobatch.data.random_states import RandomStates
from autobatch.errors import warn
from autobatch.handover.status import note_backup, note_backups_removed
from autobatch.records import Environment, Report
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.seams import fitting, random_states, versions
from autobatch.types import Model

_ALIKE = 0.1
"""Share by which the limit may differ from that of an earlier process on such a device: what is free at the start."""

LEAST_SHARE = 99
"""Times that training takes, at least, of the seconds in which it stands still for a backup: one in a hundred."""


@dataclass(frozen=True, slots=True)
class _Training:
    """Parts of a training that a backup is taken of."""

    model: Model
    batches: EffectiveBatches
    transaction: AnyTransaction
    callbacks: list[Any]
    report: Report


@dataclass(frozen=True, slots=True)
class _Place:
    """Place between two steps: those of the epoch that were made, and those of the same pass in earlier epochs."""

    epoch: int
    steps: int
    earlier_steps: int
    length: int | None
    iterator: EffectiveIterator


class TrainingBackup:
    """Backup of one training.

    ``data`` is the fingerprint of its data, ``chosen`` the micro-batch that was given, and ``limits`` are the limit and
    the headroom that were given.

    Raises:
        ValueError: the folder has a backup of other data, or of another target.
    """

    def __init__(
        self,
        settings: BackupSettings,
        *,
        data: dict[str, str],
        target_batch: int,
        chosen: int | None,
        limits: Sequence[float | None],
    ) -> None:
        self._settings = settings
        self._identity: dict[str, Any] = {
            "data": data,
            "target_batch": target_batch,
            "chosen": chosen,
            "limits": list(limits),
        }
        self._folder = BackupFolder(settings.folder)
        self._folder.clean()
        self._kept = self._folder.newest()
        if self._kept is not None:
            self._require_same(self._kept)
            note_backup(self._kept["transaction"]["updates"], written=False)
        self._writer = Writer(self._folder)
        self._termination = Termination(self._before_leaving)
        self._of: _Training | None = None
        self._model_identity: dict[str, str] | None = None
        self._epoch = 0
        self._place: _Place | None = None
        self._place_behind: Callable[[], _Place] | None = None
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

    def _require_same(self, kept: dict[str, Any]) -> None:
        if kept["target_batch"] != self._identity["target_batch"]:
            self._refuse(
                f"another target: target_batch was {kept['target_batch']} then, and is "
                f"{self._identity['target_batch']} now"
            )
        different = fingerprint.difference(kept["data"], self._identity["data"])
        if different:
            self._refuse(f"other data: {different}")

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"The backup is one of {why}. Give another folder, or remove this one to train from the start. "
            f"Received: backup={str(self._settings.folder)!r}"
        )

    def report_for(self, environment: Environment) -> Report | None:
        """Return the report that the training to go on with had, if it holds in this ``environment`` too.

        None if a new training begins, another micro-batch, limit or headroom was given, or the device is another.
        """
        names = ("chosen", "limits")
        if self._kept is None or any(self._kept.get(name) != self._identity[name] for name in names):
            return None
        report = Report.from_json(self._kept["report"])
        before, now = report.environment.limit_bytes, environment.limit_bytes
        is_alike = before == now or (before and now and abs(before - now) <= _ALIKE * before)
        return report if is_alike and report.environment.device == environment.device else None

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
        self._of = of = _Training(model, batches, transaction, callbacks, report)
        self._epoch, epochs = int(options.get("initial_epoch", 0)), int(options.get("epochs", 1))
        if self._kept is not None:
            if self._kept["epoch"] >= epochs:
                raise ValueError(
                    f"The backup is one of epoch {self._kept['epoch'] + 1}, which is not reached with "
                    f"epochs={epochs}: nothing would be trained. Pass more epochs, give another folder, or "
                    f"remove this one to train from the start. Received: epochs={epochs}, "
                    f"backup={str(self._settings.folder)!r}"
                )
            self._epoch = options["initial_epoch"] = self._kept["epoch"]
            self._prepare(of, self._kept)
            if options.get("validation_steps") and (why := versions.why_validation_begins_anew()):
                warn(why)
        begun, read = (0, 0) if self._kept is None else self._kept.get("validation_passes", (0, 0))
        self._validation = fitting.ValidationPasses(model, (begun, read))
        self._last_time, self._last_update = time.monotonic(), transaction.updates
        try:
            with (
                self._validation.counted(),
                fitting.epochs_enumerated(batches, self._enumerate),
                fitting.epoch_logs_of(model, self._give_logs, self._hold_if_stopped),
                self._termination.handled(),
            ):
                yield
        finally:
            self._of = None
            self._writer.wait()
        if not self._settings.keep:
            self._folder.remove()
            note_backups_removed()
        elif self._held is not None:
            self._writer.write_now(self._held_update, self._held)
        self._held = self._kept = None

    def _prepare(self, of: _Training, kept: dict[str, Any]) -> None:
        of.transaction.trace()
        different = fingerprint.difference(kept["model"], fingerprint.of_model(of.model))
        if different:
            self._refuse(f"another model: {different}")
        self._assign_variables(of, kept)
        of.transaction.continue_from(kept["transaction"])
        of.batches.continue_from(kept["position"])
        callback_states.warn_of_those_left_out(of.callbacks, kept["callbacks"])
        callback_states.prepare_callbacks(of.callbacks, kept["callbacks"])

    def _assign_variables(self, of: _Training, kept: dict[str, Any]) -> None:
        missing = variables.missing(_variables_of(of), kept["variables"])
        if missing:
            self._refuse(f"another model: it holds {', '.join(missing)}, which this training does not have")
        variables.assign(_variables_of(of), kept["variables"])

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
            self._termination.end_waiting()
            self._end_epoch()
            raise
        return self._logs

    def _enumerate(self, epoch_iterator: Any, steps: Iterator[Any]) -> Iterator[Any]:
        """Give the steps of an epoch, in the first behind those that were made; take backups between them."""
        epoch, self._epoch = self._epoch, self._epoch + 1
        self._held, self._held_update, self._place, made = None, 0, None, 0
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
            self._place_behind = functools.partial(_place_behind, epoch_iterator, epoch, end + 1, iterator)
            yield begin, end, iterator
            self._logs_to_give = None
            self._place = self._place_behind()
            self._behind_step()
        self._end_epoch()

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
        if not of.model.stop_training and self._is_due(of.transaction.updates):
            self._back_up(of)
        if not self._said:
            self._said = True
            _warn_of_hidden_draws(of)
        self._between_steps = not of.model.stop_training
        try:
            self._termination.end_update()
        finally:
            self._between_steps = False

    def _is_due(self, updates: int) -> bool:
        if self._settings.every_updates is not None:
            return updates - self._last_update >= self._settings.every_updates
        least = max(self._settings.every_seconds, LEAST_SHARE * self._stood_still)
        return time.monotonic() - self._last_time >= least and not self._writer.is_busy

    def _back_up(self, of: _Training) -> None:
        begun = time.monotonic()
        self._last_update = of.transaction.updates
        if _host_has_room(of):
            self._writer.write_beside(self._last_update, self._state(copies=True))
        else:
            self._writer.write_now(self._last_update, self._state(copies=False))
        self._last_time = time.monotonic()
        self._stood_still = self._last_time - begun

    def _end_epoch(self) -> None:
        """Hold what is not written yet, should a signal come before the next step: during validation, say.

        If the last backup is to be left, it is held at the end of each epoch: training may be stopped at any.
        """
        of, place, keep = self._of, self._place, self._settings.keep
        if of is None or place is None or of.transaction.updates in (self._last_update, self._held_update):
            return
        begun = time.monotonic()
        is_cheap = begun - self._held_time >= LEAST_SHARE * self._held_for
        if _host_has_room(of) and (is_cheap or keep):
            self._held, self._held_update = self._state(copies=True), of.transaction.updates
            self._held_time = time.monotonic()
            self._held_for = self._held_time - begun
        elif keep:
            self._last_update = of.transaction.updates
            self._writer.write_now(self._last_update, self._state(copies=False))

    def _before_leaving(self) -> None:
        of = self._of
        if self._between_steps and of is not None and of.transaction.updates != self._writer.written:
            self._writer.write_now(of.transaction.updates, self._state(copies=False))
        elif self._held is not None:
            self._writer.write_now(self._held_update, self._held)
        self._writer.wait()

    def _state(self, *, copies: bool) -> dict[str, Any]:
        of, place = self._of, self._place
        assert of is not None
        assert place is not None
        if self._model_identity is None:
            self._model_identity = fingerprint.of_model(of.model)
        return {
            **self._identity,
            "model": self._model_identity,
            "report": of.report.to_json(indent=None),
            "epoch": place.epoch,
            "steps": place.steps,
            "earlier_steps": place.earlier_steps,
            "length": place.length,
            "logs": callback_states.plain_copy(self._logs) if isinstance(self._logs, dict) else None,
            "variables": variables.values_of(_variables_of(of), copies=copies),
            "callbacks": callback_states.states_of(of.callbacks),
            "transaction": of.transaction.as_plain(),
            "position": of.batches.position(place.iterator.taken),
            "random": RandomStates(of.batches.loader).as_plain(),
            "seeds": random_states.eager_seeds(),
            "validation_passes": (0, 0) if self._validation is None else self._validation.made,
        }


def _place_behind(epoch_iterator: Any, epoch: int, steps: int, iterator: EffectiveIterator) -> _Place:
    seen, length = fitting.steps_in_pass(epoch_iterator)
    return _Place(epoch, steps, max(0, seen - steps), length, iterator)


def _variables_of(of: _Training) -> list[Any]:
    return [*of.transaction.variables, *random_states.global_generator_variables()]


def _host_has_room(of: _Training) -> bool:
    limit = host_memory.available()
    known = None if limit is None else limit.limit_bytes
    return known is None or variables.bytes_of(_variables_of(of)) <= known


def _warn_of_hidden_draws(of: _Training) -> None:
    hidden = of.transaction.hidden_draws
    if hidden:
        warn(
            f"The model draws random numbers whose state cannot be read ({', '.join(hidden)}), so that they begin anew "
            "after a restart, and the end is not that of a training without one. Use keras.random with a "
            "keras.random.SeedGenerator, or a tf.random.Generator, in their place."
        )
