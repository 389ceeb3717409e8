"""Report with its remedies: the model as it is, and each remedy, in a worker process of its own, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from autobatch.errors import NoFeasibleBatchError, NotApplicableError
from autobatch.records import Environment, HostUse, Outcome, Remedy, Report, TrialRequest, TrialResult, Variant
from autobatch.remedies import measuring
from autobatch.worker.trials import WorkerTrials

OpenWorker = Callable[[Variant], WorkerTrials]
Search = Callable[[WorkerTrials], Report]

_SAME_WEIGHTS = ("float32", "mixed_float16", "mixed_bfloat16")
"""Policies under which the variables have one type, so that fingerprints can be compared."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while remedies were tried; ``report`` holds those that were done."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """Report of the model as it is. ``fingerprint`` is None where it was not built in a worker, or not at all."""

    report: Report
    fingerprint: str | None = None


def report_as_it_is(open_worker: OpenWorker, search: Search) -> Base:
    """Return the report of the model as it is, an empty one where nothing fits: remedies are wanted most then."""
    try:
        trials = open_worker(Variant())
    except NoFeasibleBatchError as error:
        nowhere = Environment("not known", error.limit_bytes, "", None, 0.0, "not known", False)
        return Base(_nothing_fits(error, nowhere))
    with trials:
        try:
            return Base(search(trials), trials.fingerprint)
        except NoFeasibleBatchError as error:
            report = _nothing_fits(error, trials.environment)
            report = dataclasses.replace(
                report, model_name=trials.model_name, warnings=trials.notes, host_uses=trials.host_uses
            )
            return Base(report, trials.fingerprint)


def with_own(base: Base, *, model_name: str, host_uses: tuple[HostUse, ...]) -> Base:
    """Return ``base`` with what only the process knows that has the model and the data themselves."""
    report = dataclasses.replace(base.report, model_name=model_name, host_uses=host_uses)
    return dataclasses.replace(base, report=report)


def _nothing_fits(error: NoFeasibleBatchError, environment: Environment) -> Report:
    trial = TrialResult(1, Outcome.OUT_OF_MEMORY, detail=str(error))
    return Report(None, None, 1, (trial,), None, environment, "not even one sample fits")


def with_remedies(
    base: Base,
    open_worker: OpenWorker,
    search: Search,
    *,
    host_total_bytes: int | None,
    on_start: Callable[[str], None] | None = None,
) -> Report:
    """Return ``base.report`` with its remedies and the advice; ``on_start`` gets each next step in words.

    Raises:
        Interrupted: Ctrl-C came; it holds the remedies that were done.
    """
    report = dataclasses.replace(base.report, advice=measuring.advice(base.report, host_total_bytes))
    done: list[Remedy] = []

    def tell(words: str) -> None:
        if on_start is not None:
            on_start(words)

    def run(variant: Variant) -> measuring.Measured:
        with open_worker(variant) as trials:
            comparable = base.fingerprint is not None and report.environment.precision in _SAME_WEIGHTS
            if comparable and trials.fingerprint != base.fingerprint:
                raise NotApplicableError(
                    f"another model is built with it, {trials.fingerprint} in place of {base.fingerprint}, and their "
                    "figures cannot be compared"
                )
            return measuring.Measured(search(trials), trials.rematerialised)

    def again(micro_batch: int) -> TrialResult:
        tell("The model as it is once more")
        with open_worker(Variant()) as trials:
            limited = trials.environment.budget_bytes is not None
            return trials.run(TrialRequest(micro_batch, record_allocations=limited))  # as the first time

    try:
        report, found = measuring.measure(
            report,
            run,
            again=again,
            on_start=lambda name, number, count: tell(f"Remedy {number} of {count}, {name}"),
            on_remedy=done.append,
        )
    except KeyboardInterrupt:
        found = measuring.unfinished(report, done)
        raise Interrupted(dataclasses.replace(report, remedies=found)) from None
    return dataclasses.replace(report, remedies=found)
