"""``fit``, ``tune`` and ``wrap_step``: the one place that wires the rooms together.

Importing this imports no TensorFlow; using it does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from autobatch import arguments, interrupts
from autobatch.errors import CannotBeCutError
from autobatch.opening import effective_batch, open_trials, require_compiled, require_model
from autobatch.records import Report
from autobatch.search import planning
from autobatch.sizing.search_trials import search_with as search_with  # the command line's way in
from autobatch.sizing.searched_or_given import searched_or_given, shown_search
from autobatch.terminal import kept_aside
from autobatch.tracebacks import showing_users_line

if TYPE_CHECKING:
    import keras

    from autobatch import training_history
    from autobatch.replicas import resume
    from autobatch.train import started_again, wrapped_step
    from autobatch.trial.live_trials import LiveTrials
    from autobatch.trial.protocol import Trials
else:

    class _OnUse:
        """Module that is imported when a name of it is looked up, as ``typing.get_type_hints`` does."""

        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    keras = _OnUse("keras")
    training_history = _OnUse("autobatch.training_history")
    wrapped_step = _OnUse("autobatch.train.wrapped_step")


@showing_users_line
def fit(
    model: keras.Model,
    dataset: Any,
    y: Any = None,
    *,
    target_batch: int,
    micro_batch: int | str = "auto",
    memory_limit: int | str | None = None,
    headroom: float | str = 0.05,
    memory_watch: bool = True,
    cache: bool = True,
    worker_timeout: float = 600.0,
    backup: str | os.PathLike[str] | None = None,
    backup_every: str | int = "60s",
    keep_backup: bool = False,
    **fit_options: Any,
) -> training_history.TrainingHistory:
    """Train a compiled Keras model at an effective batch of ``target_batch``, in whatever memory there is.

    Args:
        model: Any compiled Keras 3 model on the TensorFlow backend.
        dataset: Data as ``Model.fit`` takes for ``x``: arrays, a ``tf.data.Dataset`` (of batches or of samples), a
            ``keras.utils.PyDataset``, a generator, a ``torch.utils.data.DataLoader``; or a tuple ``(x, y)`` or
            ``(x, y, sample_weight)`` of arrays.
        y: The targets, where ``dataset`` holds the inputs alone.
        target_batch: Samples that one optimizer update averages over.
        micro_batch: Samples on the device at a time: "auto" searches for the fastest that fits; a number skips the
            search and is the most at a time. Micro-batches are of even sizes: at 5, 16 samples are 4 times 4.
        memory_limit: Upper bound on device memory, in bytes or as "512MiB"; None uses what the device has.
        headroom: Share of the limit that is left alone, or bytes as "500MiB".
        memory_watch: Warn when memory grows from epoch to epoch, with the likely cause, two epochs after the growth
            has proved to be steady. See :class:`autobatch.MemoryWatch`: a watch among your own ``callbacks`` takes its
            place, and names the cause at once.
        cache: Remember what the search finds, in the user's cache folder; where it is remembered already, confirm it
            with one trial and skip the search.
        worker_timeout: Under ``MultiWorkerMirroredStrategy``, the seconds that a worker waits for the others at any
            one place, while they trace and compile too.
        backup: Folder to keep the training in, such as "runs/a". The same call after a restart goes on behind the last
            update that was kept. It is removed when training has ended. Under ``MultiWorkerMirroredStrategy`` every
            worker is given one, and the first worker writes for all.
        backup_every: Time between two backups, such as "60s" or "5min", or a number of updates.
        keep_backup: Leave the last backup where it is; the same call with more ``epochs`` then goes on behind it.
        **fit_options: Every other option of ``Model.fit``, meaning what it means there; ``steps_per_epoch`` counts
            updates, and ``verbose=0`` keeps a notebook from showing the search as well.

    Returns:
        Keras's ``History``, with ``plan``, ``report`` and ``recoveries``: see :class:`autobatch.TrainingHistory`.

    Raises:
        TypeError, ValueError: An argument cannot be used; nothing has been run or changed.
        NoFeasibleBatchError: Not even one sample fits.
        UpdateInterruptedError: An update ran out of memory half-way and could not be undone.
        WorkerLostError: Under ``MultiWorkerMirroredStrategy``, another worker died, failed or did not answer in time.
        WorkersDisagreeError: The workers were given different data or arguments.
    """
    target = arguments.target_batch(target_batch)
    chosen = arguments.micro_batch(micro_batch)
    limit_bytes = arguments.memory_limit(memory_limit)
    share = arguments.headroom(headroom, limit_bytes)
    remembers = arguments.cache(cache)
    timeout_seconds = arguments.worker_timeout(worker_timeout)
    require_model(model)
    arguments.require_fit_options(model, fit_options)

    from autobatch.backup import opening as backup_opening
    from autobatch.seams import fitting
    from autobatch.step import supported
    from autobatch.train.through_own_fit import train_through_own_fit

    supported.require_supported(model)
    backups = backup_opening.Backups(
        backup,
        backup_every,
        keep_backup,
        target_batch=target,
        chosen=chosen,
        limits=(limit_bytes, share),
    )

    def train_as_told(given: dict[str, Any], keras_fit: Callable[..., Any]) -> training_history.TrainingHistory:
        from autobatch.train import started_again

        with started_again.as_told(model) as again:
            return train(given, keras_fit, again)

    def train(
        given: dict[str, Any], keras_fit: Callable[..., Any], again: started_again.StartedAgain
    ) -> training_history.TrainingHistory:
        """Train on what Keras's own ``fit`` of the model is given, ``x`` among it."""
        from autobatch.data import fit_data
        from autobatch.replicas import resume
        from autobatch.replicas.devices import devices_of_model, open_training
        from autobatch.step import kept_steps
        from autobatch.train import session

        require_compiled(model)
        devices = devices_of_model(model, timeout_seconds)
        x, y = given.pop("x", None), given.pop("y", None)
        saved = backups.open(x, y, given, devices.processes())
        batches, options = fit_data.prepare_data(
            model, x, y, target_batch=target, options=given, keeps_order=saved is not None
        )

        @interrupts.not_lost()
        def open_and_search() -> tuple[LiveTrials, resume.KeptPlan | None, Report]:
            effective = effective_batch(batches)
            trials = devices.open_trials(
                model, batches, target_batch=effective, user_limit_bytes=limit_bytes, headroom=share
            )
            again.lower_trials(trials)
            with contextlib.ExitStack() as after_an_error:
                after_an_error.callback(kept_steps.give_back, trials.step)
                effective *= trials.samples_in_portion
                callbacks, replicas = options.get("callbacks"), trials.replicas
                kept = resume.remembered(callbacks, devices.gather, target_batch=effective, replicas=replicas)
                planned = (
                    "no search: micro_batch was given" if chosen else "no search: the plan was kept beside the backup"
                )
                report = searched_or_given(
                    trials,
                    chosen or (kept.planned if kept else None),
                    why=planned,
                    target_batch=effective,
                    cache=remembers,
                    listed_in="history.report.warnings",
                    quiet=given.get("verbose") == 0,
                    found=None if saved is None else saved.report_for(trials.environment),
                )
                after_an_error.pop_all()
            return trials, kept, report

        try:
            trials, kept, report = open_and_search()
        except CannotBeCutError as found:  # the first trace has shown it, before anything was trained
            batches.keep_whole(found.reason)
            trials, kept, report = open_and_search()
        release: Callable[[], None] = functools.partial(kept_steps.give_back, trials.step)
        try:
            batches.say_how_they_are_cut()
            begin_at = kept.micro_batch if kept and chosen is None else None
            transaction = open_training(devices, trials, report, user_limit_bytes=limit_bytes, begin_at=begin_at)
            release = transaction.release
            kept_steps.begin_training(model)
            history = session.train(
                model,
                batches,
                transaction,
                devices=devices,
                report=report,
                options=options,
                memory_watch=memory_watch,
                keras_fit=keras_fit,
                backup=saved,
                again=again,
            )
            if remembers and not transaction.recoveries:
                trials.keep_report(report)
            return history
        finally:
            release()
            kept_aside.end_soon()

    with contextlib.closing(backups):
        if not fitting.overrides_fit(model):
            return train_as_told({"x": dataset, "y": y, **fit_options}, model.fit)
        return train_through_own_fit(model, dataset, y, target_batch=target, options=fit_options, train=train_as_told)


@showing_users_line
@interrupts.not_lost()
def tune(
    model: keras.Model,
    dataset: Any,
    y: Any = None,
    *,
    target_batch: int | None = None,
    memory_limit: int | str | None = None,
    headroom: float | str = 0.05,
    exact: bool = False,
    objective: str = "throughput",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    cache: bool = True,
    remedies: bool = False,
) -> Report:
    """Search for the micro-batch without training; the model and the data are left as they were.

    Args:
        model, dataset, y, memory_limit, headroom, cache: As for :func:`fit`.
        target_batch: As for :func:`fit`; None only searches for the largest micro-batch.
        exact: Prove that the size found is the largest: it fits, and the next one was run and does not.
        objective: "throughput" plans for the shortest update, "largest" for the largest micro-batch.
        max_trials, max_seconds: Stop after as many trials or seconds, with the best size so far. It is not remembered.
        remedies: Try mixed precision, XLA, rematerialisation and an optimizer without slots as well, then the best
            combination; see ``report.remedies``. Each runs in a worker process, as does the model itself then, which
            takes minutes. A script that calls this needs no ``if __name__ == "__main__"``. Where nothing fits, the
            report says so instead of an error.

    Raises:
        TypeError, ValueError: An argument cannot be used; nothing has been run or changed.
        NoFeasibleBatchError: Not even one sample fits.
    """
    target = None if target_batch is None else arguments.target_batch(target_batch)
    limit_bytes = arguments.memory_limit(memory_limit)
    share = arguments.headroom(headroom, limit_bytes)
    remembers = arguments.cache(cache)
    planning.require_objective(objective)
    arguments.require_keras_3(model)

    from autobatch.step import kept_steps

    limits: dict[str, Any] = {"memory_limit_bytes": limit_bytes, "headroom": share}
    trials = open_trials(model, dataset, y, target_batch=target, **limits)
    trials.require_no_clock(max_seconds)
    if target is not None and trials.largest_useful is not None:
        target = min(target, trials.largest_useful * trials.replicas * trials.samples_in_portion)

    def search_one(trials: Trials) -> Report:
        return shown_search(
            trials,
            target_batch=target,
            exact=exact,
            objective=objective,
            max_trials=max_trials,
            max_seconds=max_seconds,
            # Only the planned size of a remembered result is run again, and remedies are measured by the largest.
            cache=remembers and not remedies,
        )

    try:
        if not remedies:
            try:
                report = search_one(trials)
            except CannotBeCutError as found:
                trials.close()
                kept_steps.give_back(trials.step)
                trials = open_trials(model, dataset, y, target_batch=target, cannot_be_cut=found.reason, **limits)
                report = search_one(trials)
            if remembers and objective == "throughput" and max_trials is max_seconds is None:
                trials.keep_report(report)
            return report
        from autobatch.remedies import rebuilding

        return rebuilding.report_with_remedies(
            model,
            trials.batch_of,
            trials,
            search_one,
            target_batch=target,
            memory_limit_bytes=limit_bytes,
            headroom=share,
        )
    finally:
        trials.close()
        kept_steps.give_back(trials.step)
        kept_aside.end_soon()


def wrap_step(
    train_step: Callable[[Any], Any],
    *,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | Sequence[keras.optimizers.Optimizer],
    target_batch: int,
    micro_batch: int | str = "auto",
    memory_limit: int | str | None = None,
    headroom: float | str = 0.05,
    jit_compile: bool = False,
    cache: bool = True,
) -> wrapped_step.WrappedStep:
    """Give a training loop of your own the search, the accumulation and the recovery of :func:`fit`.

    ``for batch in dataset: loss = step(batch)`` then makes one update a batch, of up to ``target_batch`` samples.

    Args:
        train_step: Takes one batch, runs forward and backward, calls ``apply`` (or ``apply_gradients``) of each
            optimizer once, and returns what you want back: scalars are averaged over the batch. It is traced, so write
            it as for ``tf.function``. A loss that is a mean over samples, or a ``keras.losses.Loss``, is exact.
        model: The model whose variables it trains.
        optimizer: The Keras optimizer that it calls, or a list or tuple of several; others that it calls are found.
        target_batch: Samples in the batches that you will pass; the search is made for it at the first of them.
        micro_batch, memory_limit, headroom, cache: As for :func:`fit`.
        jit_compile: Compile the step with XLA.

    Raises:
        TypeError, ValueError: An argument cannot be used.
    """
    target = arguments.target_batch(target_batch)
    chosen = arguments.micro_batch(micro_batch)
    limit_bytes = arguments.memory_limit(memory_limit)
    share = arguments.headroom(headroom, limit_bytes)
    remembers = arguments.cache(cache)
    if not callable(train_step):
        raise TypeError(f"train_step must be a function of one batch. Received: {train_step!r}")
    arguments.require_keras_3(model)

    from autobatch.replicas.devices import require_one_device
    from autobatch.step import supported
    from autobatch.step.loop_model import LoopModel
    from autobatch.train.wrapped_step import StepSession, WrappedStep

    supported.require_stateless(model)
    devices = require_one_device(model)
    loop_model = LoopModel(train_step, model, optimizer, jit_compile=jit_compile)
    find_report = functools.partial(
        searched_or_given,
        micro_batch=chosen,
        cache=remembers,
        listed_in="the wrapped step's report.warnings",
    )
    session = StepSession(
        loop_model, devices, find_report, target_batch=target, user_limit_bytes=limit_bytes, headroom=share
    )
    name = getattr(train_step, "__name__", type(train_step).__name__)
    return WrappedStep(session, name=name, target_batch=target, micro_batch=chosen)
