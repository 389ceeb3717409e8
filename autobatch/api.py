"""``fit`` and ``tune``: the one place that wires the rooms together.

Importing this imports no TensorFlow; using it does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autobatch import arguments, search
from autobatch.errors import AutobatchWarning, NoFeasibleBatchError
from autobatch.records import Plan, Report, TrialResult
from autobatch.search import planning
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.train.data import EffectiveBatches
    from autobatch.train.loop import WrappedStep
    from autobatch.trial.in_process import LiveTrials
    from autobatch.trial.protocol import Trials

SAMPLE_ROWS = 32
"""Samples that are taken from the data where no target says how many; trials repeat them as needed."""


def fit(
    model: Any,
    dataset: Any,
    y: Any = None,
    *,
    target_batch: int,
    micro_batch: int | str = "auto",
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    memory_watch: bool = True,
    worker_timeout: float = 600.0,
    **fit_options: Any,
) -> Any:
    """Train a compiled Keras model at an effective batch of ``target_batch``, in whatever memory there is.

    Args:
        model: Any compiled Keras 3 model on the TensorFlow backend.
        dataset: What ``Model.fit`` takes as ``x``: arrays, a ``tf.data.Dataset`` (of batches or of samples), a
            ``keras.utils.PyDataset``, a generator, a ``torch.utils.data.DataLoader``; or a tuple ``(x, y)`` or
            ``(x, y, sample_weight)`` of arrays.
        y: The targets, where ``dataset`` holds the inputs alone.
        target_batch: Samples that one optimizer update averages over.
        micro_batch: Samples on the device at a time: "auto" searches for the fastest that fits; a number skips the
            search and starts there.
        memory_limit: At most so much, in bytes or as "512MiB"; None uses what the device has.
        headroom: The share of the limit that is left alone.
        memory_watch: Warn when memory grows from epoch to epoch, with the likely cause; see
            :class:`autobatch.MemoryWatch`. One among your own ``callbacks`` takes its place.
        worker_timeout: Under ``MultiWorkerMirroredStrategy``, the seconds that a worker waits for the others at any
            one place, while they trace and compile too.
        **fit_options: Every other option of ``Model.fit``, meaning what it means there; ``steps_per_epoch`` counts
            updates.

    Returns:
        Keras's ``History``, with ``plan``, ``report`` and ``recoveries`` as further attributes.

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
    share = arguments.headroom(headroom)
    timeout_seconds = arguments.worker_timeout(worker_timeout)
    _require_compiled(model)
    arguments.require_fit_options(model, fit_options)

    from autobatch.train import keras_seams, scaling, session
    from autobatch.trial import replicated

    keras_seams.require_supported(model)
    agreement = scaling.agree_for(model, timeout_seconds)
    batches, options = session.prepare_data(model, dataset, y, target_batch=target, options=fit_options)
    effective = _effective_batch(batches, target)
    trials = replicated.open_on(
        model, batches, agreement=agreement, target_batch=effective, user_limit_bytes=limit_bytes, headroom=share
    )
    known = scaling.remembered(options, agreement, target_batch=effective, replicas=trials.replicas)
    if chosen is None and known is None:
        try:
            report = search_with(trials, target_batch=effective)
        finally:
            trials.close()
    else:
        why = "no search: micro_batch was given" if chosen else "no search: the plan was kept beside the backup"
        report = _unsearched(trials, min(chosen or known or 1, -(-effective // trials.replicas)), effective, why)
    _say_what_differs(report)
    return session.train(
        model,
        batches,
        step=trials.step,
        report=report,
        device=trials.device,
        user_limit_bytes=limit_bytes,
        options=options,
        memory_watch=memory_watch,
        agreement=agreement,
    )


def tune(
    model: Any,
    dataset: Any,
    y: Any = None,
    *,
    target_batch: int | None = None,
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    exact: bool = False,
    objective: str = "throughput",
    max_trials: int | None = None,
    max_seconds: float | None = None,
) -> Report:
    """Search for the micro-batch without training; the model and the data are left as they were.

    Args:
        model, dataset, y, memory_limit, headroom: As for :func:`fit`.
        target_batch: As for :func:`fit`; None searches for the largest micro-batch alone.
        exact: Prove that the size found is the largest: it fits, and the next one was run and does not.
        objective: "throughput" plans for the shortest update, "largest" for the largest micro-batch.
        max_trials, max_seconds: Stop after so many, with the best size found until then.

    Raises:
        TypeError, ValueError: An argument cannot be used; nothing has been run or changed.
        NoFeasibleBatchError: Not even one sample fits.
    """
    target = None if target_batch is None else arguments.target_batch(target_batch)
    limit_bytes = arguments.memory_limit(memory_limit)
    share = arguments.headroom(headroom)
    planning.require_objective(objective)
    trials = open_trials(model, dataset, y, target_batch=target, memory_limit_bytes=limit_bytes, headroom=share)
    trials.require_no_clock(max_seconds)
    if target is not None and trials.largest_useful is not None:
        target = min(target, trials.largest_useful * trials.replicas)
    try:
        return search_with(
            trials,
            target_batch=target,
            exact=exact,
            objective=objective,
            max_trials=max_trials,
            max_seconds=max_seconds,
        )
    finally:
        trials.close()
        trials.step.release_accumulators()


def open_trials(
    model: Any,
    dataset: Any,
    y: Any = None,
    *,
    target_batch: int | None,
    memory_limit_bytes: int | None,
    headroom: float,
) -> LiveTrials:
    """Make trials on a live model; :meth:`LiveTrials.close` puts everything back. See :func:`tune`."""
    _require_compiled(model)

    from autobatch.train import keras_seams, scaling, session
    from autobatch.trial import replicated

    session.require_repeatable(dataset)
    keras_seams.require_supported(model)
    agreement = scaling.agree_for(model)
    rows = SAMPLE_ROWS if target_batch is None else target_batch
    batches, _ = session.prepare_data(model, dataset, y, target_batch=rows, options={"shuffle": False}, only_look=True)
    effective = None if target_batch is None else _effective_batch(batches, target_batch)
    return replicated.open_on(
        model,
        batches,
        agreement=agreement,
        target_batch=effective,
        user_limit_bytes=memory_limit_bytes,
        headroom=headroom,
    )


def search_with(
    trials: Trials,
    *,
    target_batch: int | None,
    exact: bool = False,
    objective: str = "throughput",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> Report:
    """Run the search over any source of trials and make the report of it.

    Raises:
        NoFeasibleBatchError: Not even one sample fits.
    """
    environment = trials.environment
    each = None if target_batch is None else -(-target_batch // trials.replicas)
    if each is not None and trials.largest_useful is not None:
        each = min(each, trials.largest_useful)
        target_batch = each if trials.replicas == 1 else target_batch
    result = search.search(
        trials.run,
        target_batch=each,  # sizes are those of one replica
        budget_bytes=environment.budget_bytes,
        max_micro_batch=trials.largest_useful,
        fixed_bytes_hint=trials.fixed_bytes_hint,
        exact=exact,
        objective=objective,
        max_trials=max_trials,
        max_seconds=max_seconds,
        clock=time.monotonic,
        on_trial=on_trial,
    )
    if result.largest_fit is None:
        raise _nothing_fits(trials, result.trials)
    plan = None
    if target_batch is not None:
        micro_batch = planning.make_plan(result.trials, target_batch=each or 1, objective=objective).micro_batch
        plan = _plan(micro_batch, target_batch, trials.replicas)
    accumulates = plan is None or plan.accumulation_steps > 1 or plan.replicas > 1
    return Report(
        plan=plan,
        largest_fit=result.largest_fit,
        smallest_failure=result.smallest_failure,
        trials=result.trials,
        memory_model=result.memory_model,
        environment=environment,
        stopped_because=result.stopped_because,
        model_name=trials.model_name,
        warnings=trials.warnings if accumulates else (),
        host_uses=trials.host_uses,
    )


def _require_compiled(model: Any) -> None:
    if not hasattr(model, "train_step"):
        raise TypeError(f"model must be a Keras model. Received: {model!r} (of type {type(model).__name__})")
    if not getattr(model, "compiled", False):
        raise ValueError(
            "The model is not compiled: call model.compile(optimizer, loss) first. "
            f"Received: {getattr(model, 'name', model)!r}"
        )


def _effective_batch(batches: EffectiveBatches, target_batch: int) -> int:
    if batches.sample_limit is None or batches.sample_limit >= target_batch:
        return target_batch
    warnings.warn(
        f"target_batch={target_batch} is larger than the data set, which has {batches.sample_limit} samples: there "
        f"will be one update an epoch, over {batches.sample_limit} samples.",
        AutobatchWarning,
        stacklevel=3,
    )
    return batches.sample_limit


def _say_what_differs(report: Report) -> None:
    plan = report.plan
    if plan is None or not report.warnings:
        return
    pieces = f"{plan.accumulation_steps * plan.replicas} micro-batches of {plan.micro_batch}"
    warnings.warn(
        f"{pieces} will differ from one batch of {plan.effective_batch} in this: {' '.join(report.warnings)}",
        AutobatchWarning,
        stacklevel=3,
    )


def _plan(micro_batch: int, effective_batch: int, replicas: int) -> Plan:
    return Plan(micro_batch, -(-effective_batch // (micro_batch * replicas)), effective_batch, replicas)


def _unsearched(
    trials: LiveTrials, micro_batch: int, effective_batch: int, why: str = "no search: micro_batch was given"
) -> Report:
    plan = _plan(micro_batch, effective_batch, trials.replicas)
    accumulates = plan.accumulation_steps > 1 or plan.replicas > 1
    if accumulates:
        trials.trace()
    return Report(
        plan=plan,
        largest_fit=None,
        smallest_failure=None,
        trials=(),
        memory_model=None,
        environment=trials.environment,
        stopped_because=why,
        model_name=trials.model_name,
        warnings=trials.warnings if accumulates else (),
        host_uses=trials.host_uses,
    )


def _nothing_fits(trials: Trials, tried: tuple[TrialResult, ...]) -> NoFeasibleBatchError:
    smallest = min(tried, key=lambda trial: trial.micro_batch)
    environment = trials.environment
    known = [value for value in (smallest.peak_bytes, trials.fixed_bytes_hint) if value is not None]
    needed = max(known, default=None)
    if needed is not None and smallest.peak_bytes is None:
        needed += smallest.requested_bytes or 0
    needs = "more than there is" if needed is None else f"at least {format_bytes(needed)}"
    limit = (
        "unknown"
        if environment.limit_bytes is None
        else f"{format_bytes(environment.limit_bytes)} ({environment.limit_source})"
    )
    return NoFeasibleBatchError(
        f"Not even a micro-batch of {smallest.micro_batch} fits on {environment.device}: it needs {needs}, and the "
        f"limit is {limit}{f', of which {environment.headroom:.0%} is headroom' if environment.headroom else ''}. "
        "Free memory, raise the limit, use smaller samples, a smaller model or an optimizer with fewer slots.",
        needed_bytes=needed,
        limit_bytes=environment.limit_bytes,
    )


def wrap_step(
    train_step: Callable[[Any], Any],
    *,
    model: Any,
    optimizer: Any,
    target_batch: int,
    micro_batch: int | str = "auto",
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    jit_compile: bool = False,
) -> WrappedStep:
    """Give a training loop of your own the search, the accumulation and the recovery of :func:`fit`.

    ``for batch in dataset: loss = step(batch)`` then makes one update a batch, of up to ``target_batch`` samples.

    Args:
        train_step: Takes one batch, runs forward and backward, calls ``optimizer.apply`` (or ``apply_gradients``)
            once, and returns what you want back: scalars are averaged over the batch. It is traced, so write it as for
            ``tf.function``. A loss that is a mean over samples, or a ``keras.losses.Loss``, is exact.
        model: The model whose variables it trains.
        optimizer: The optimizer that it calls.
        target_batch: Samples in the batches that you will pass; the search is made for it at the first of them.
        micro_batch, memory_limit, headroom: As for :func:`fit`.
        jit_compile: Compile the step with XLA.

    Raises:
        TypeError, ValueError: An argument cannot be used.
    """
    target = arguments.target_batch(target_batch)
    chosen = arguments.micro_batch(micro_batch)
    limit_bytes = arguments.memory_limit(memory_limit)
    share = arguments.headroom(headroom)
    if not callable(train_step):
        raise TypeError(f"train_step must be a function of one batch. Received: {train_step!r}")

    import tensorflow as tf

    from autobatch.train import strategy_seams
    from autobatch.train.loop import LoopModel, OneBatch, WrappedStep, element_spec_of
    from autobatch.train.recovery import Transaction
    from autobatch.train.structure import Structure, sample_count
    from autobatch.trial.in_process import LiveTrials

    if strategy_seams.strategy_of(model) is not None or tf.distribute.has_strategy():
        raise ValueError(
            "wrap_step works on one device. Under a tf.distribute strategy give the loop to a model as its train_step "
            f"and call autobatch.fit. Received: {getattr(model, 'name', model)!r}, made under a strategy"
        )
    shell = LoopModel(train_step, model, optimizer, jit_compile=jit_compile)

    def open_first(batch: Any) -> Any:
        samples = int(sample_count(Structure(element_spec_of(batch)).leaves(batch)))
        batches = OneBatch(batch, max(samples, target))
        trials = LiveTrials(shell, batches, target_batch=target, user_limit_bytes=limit_bytes, headroom=share)
        if chosen is None:
            try:
                report = search_with(trials, target_batch=target)
            finally:
                trials.close()
        else:
            report = _unsearched(trials, min(chosen, target), target)
        _say_what_differs(report)
        assert report.plan is not None
        transaction = Transaction(
            trials.step,
            report.plan.micro_batch,
            device=trials.device,
            memory_model=report.memory_model,
            user_limit_bytes=limit_bytes,
            headroom=share,
        )
        return trials.step, transaction, report

    return WrappedStep(open_first)
