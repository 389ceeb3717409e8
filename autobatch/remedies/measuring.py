"""Remedies that may make a model fit better, tried on the model itself: which there are, and the worth of each.

This module knows records and arithmetic only. Its caller gives it a function that builds the model anew with a
:class:`~autobatch.records.Variant`, searches, and returns the report: a worker process for each, one at a time. Nothing
is promised that was not run. A remedy that cannot be run says why; one that gains nothing shows it in its figures.

A remedy gains if the update at the target becomes shorter by more than 3 %. Where there is no target, it gains if the
largest micro-batch grows by as much. Two searches of the same model differ by 3 %. The best combination is made of the
remedies that gain alone. An optimizer without slots is no part of it, whatever it gains: it trains another way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from autobatch.errors import AutobatchError, NoFeasibleBatchError, NotApplicableError, UserCodeError
from autobatch.records import Remedy, Report, TrialResult, Variant
from autobatch.units import format_bytes, format_seconds

GAIN = 1.03
"""Least ratio that is a gain: the search itself ends within 3 %, and step times repeat about as well."""

UNSTEADY = 1.25
"""Ratio between two times of the same step from which on a warning is due."""

PIPELINE_SHARE = 0.1
"""Share of the host's memory from which on the input pipeline's part of it is worth a word."""

COMBINATION = "best combination"
INTERRUPTED = "not measured: interrupted"
NO = "does not apply"
MOST_NAMES = 6
"""Largest number of layers that are named in a line of code."""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """Remedy before it is tried: its line of code, the way training will differ, and the variant that has it."""

    name: str
    code: str
    changes_training: str
    variant: Variant


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Report of a variant, and the layers that ``keras.RematScope`` covers in it."""

    report: Report
    rematerialised: tuple[str, ...] = ()


Run = Callable[[Variant], Measured]
"""Function that builds the variant in a worker of its own and searches.

It raises ``NotApplicableError`` where the variant does not apply, ``NoFeasibleBatchError`` where nothing fits, and
another ``AutobatchError`` where the model fails under it.
"""


def candidates(base: Report) -> tuple[Candidate, ...]:
    """Return the remedies to try one by one, the cheapest to adopt first."""
    policies = [
        _precision("mixed_bfloat16", "activations and gradients with 8 bits of mantissa; the weights stay float32"),
        _precision("mixed_float16", "activations and gradients with 11 bits of mantissa, the loss scaled"),
    ]
    jit = not base.environment.jit_compile
    xla = Candidate(
        f"XLA {'on' if jit else 'off'}", f"model.compile(..., jit_compile={jit})", "", Variant(jit_compile=jit)
    )
    layers = Candidate("rematerialised layers", _remat_code(()), "", Variant(rematerialise="layers"))
    activations = Candidate(
        "rematerialised activations",
        'with keras.RematScope(mode="activations"):\n    model = build()',
        "",
        Variant(rematerialise="activations"),
    )
    sgd = Candidate(
        "optimizer without slots",
        "model.compile(keras.optimizers.SGD(learning_rate), loss)",
        "another optimizer: tune its learning rate anew",
        Variant(slotless_optimizer=True),
    )
    return (*policies, xla, layers, activations, sgd)


def _precision(policy: str, consequence: str) -> Candidate:
    code = f'keras.mixed_precision.set_global_policy("{policy}")  # before the model is built'
    return Candidate(policy, code, consequence, Variant(precision=policy))


def _remat_code(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMES:
        first, listed = [f"# names: the {len(names)} layers whose call() takes neither training nor mask"], "names"
    else:
        first, listed = [], f"[{', '.join(map(repr, names)) or '...'}]"
    scope = f'with keras.RematScope(mode="list_of_layers", layer_names={listed}):'
    return "\n".join([*first, scope, "    model = build()"])


def measure(
    base: Report,
    run: Run,
    *,
    again: Callable[[int], TrialResult],
    on_start: Callable[[str, int, int], None] | None = None,
    on_remedy: Callable[[Remedy], None] | None = None,
) -> tuple[Report, tuple[Remedy, ...]]:
    """Try every remedy of :func:`candidates`, then the best combination; return the base and what each gave.

    ``again`` runs the model as it is once more, at its decisive micro-batch, after the single remedies. A faster time
    counts, and the advice says so if the time has changed much. ``on_start`` gets the name, the number (from 1) and the
    count of all before each remedy. ``on_remedy`` gets each remedy as it is done, so that an interrupt loses only the
    one under way; see :func:`unfinished`.
    """
    tried = candidates(base)
    done: list[Remedy] = []
    count = len(tried) + 1

    def add(candidate: Candidate) -> Remedy:
        if on_start is not None:
            on_start(candidate.name, len(done) + 1, count)
        remedy = _try(candidate, base, run)
        done.append(remedy)
        if on_remedy is not None:
            on_remedy(remedy)
        return remedy

    for candidate in tried:
        add(candidate)
    base = _steadied(base, again)
    gaining = [(each, remedy) for each, remedy in zip(tried, done, strict=True) if gains(remedy, base)]
    gaining = [(each, remedy) for each, remedy in gaining if remedy.keeps_optimizer]
    combined, reason = _combination(gaining)
    if combined is not None:
        add(combined)
    else:
        done.append(Remedy(COMBINATION, "", why_not=reason))
        if on_remedy is not None:
            on_remedy(done[-1])
    return base, recommend(done, base)


def unfinished(base: Report, done: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """Return ``done``, and the remedies that an interrupt left out."""
    planned = [*((each.name, each.code) for each in candidates(base)), (COMBINATION, "")]
    left_out = [Remedy(name, code, why_not=INTERRUPTED) for name, code in planned[len(done) :]]
    return recommend([*done, *left_out], base)


def without_remedies(base: Report, reason: str) -> Report:
    """Return ``base`` with every remedy unmeasured, for one ``reason``."""
    planned = [*((each.name, each.code) for each in candidates(base)), (COMBINATION, "")]
    return dataclasses.replace(
        base, remedies=tuple(Remedy(name, code, why_not=f"{NO}: {reason}") for name, code in planned)
    )


def gains(remedy: Remedy, base: Report) -> bool:
    """Return True if ``remedy`` is better than the model as it is, by what counts; see the top of this module."""
    if not remedy.measured or remedy.largest_fit is None:
        return False
    if base.largest_fit is None:
        return True
    if remedy.update_seconds is not None and base.update_seconds is not None:
        return base.update_seconds >= GAIN * remedy.update_seconds
    return remedy.largest_fit >= GAIN * base.largest_fit


def recommend(remedies: Sequence[Remedy], base: Report) -> tuple[Remedy, ...]:
    """Return ``remedies`` with the best one marked, if any of them gains and keeps the optimizer."""
    good = [remedy for remedy in remedies if remedy.keeps_optimizer and gains(remedy, base)]
    best = max(good, key=_merit, default=None)
    return tuple(dataclasses.replace(remedy, recommended=remedy is best) for remedy in remedies)


def advice(base: Report, host_total_bytes: int | None) -> tuple[str, ...]:
    """Return what the measurements say about memory growth and the input pipeline; empty where neither matters."""
    found = []
    if any(trial.retried for trial in base.trials):
        found.append(
            "Another process took memory on the device while trials ran. Let both start small: "
            "autobatch.configure_memory(growth=True) in each, before TensorFlow starts its devices."
        )
    held = sum(use.held_bytes for use in base.host_uses)
    if host_total_bytes and held >= PIPELINE_SHARE * host_total_bytes:
        largest = max(base.host_uses, key=lambda use: use.held_bytes)
        found.append(
            f"The input pipeline will hold {format_bytes(held)} of the host's {format_bytes(host_total_bytes)} "
            f"({100 * held / host_total_bytes:.0f} %), most of it in {largest.name}: a smaller buffer, or data read as "
            "they are needed, frees it."
        )
    return tuple(found)


def _try(candidate: Candidate, base: Report, run: Run) -> Remedy:
    keeps = not candidate.variant.slotless_optimizer
    plain = Remedy(candidate.name, candidate.code, candidate.changes_training, keeps_optimizer=keeps)
    if candidate.variant.precision == base.environment.precision:
        return dataclasses.replace(plain, why_not=f"{NO}: the model has this policy already")
    try:
        measured = run(candidate.variant)
    except NotApplicableError as error:
        return dataclasses.replace(plain, why_not=f"{NO}: {_first_line(error)}")
    except NoFeasibleBatchError as error:
        return dataclasses.replace(plain, smallest_failure=1, stopped_because=_first_line(error))
    except UserCodeError as error:
        why = _in_words(candidate.variant, error)
        return dataclasses.replace(plain, why_not=f"{NO}: the model fails with it: {why}")
    except AutobatchError as error:
        return dataclasses.replace(plain, why_not=f"{NO}: {_first_line(error)}")
    return _figures(plain, measured, base, candidate.variant)


_SAY_NOTHING = ("TypeError", "AttributeError", "KeyError", "IndexError", "AssertionError", "RecursionError")
"""Errors whose words are for whoever wrote the code that failed: Keras's, since the model runs without the remedy."""


def _in_words(variant: Variant, error: UserCodeError) -> str:
    """Return why a model fails with a remedy, in words for its user, who has written no line of what has failed."""
    said = _first_line(error)
    if said.partition(":")[0] not in _SAY_NOTHING:
        return said
    if variant.rematerialise is not None:
        why = "Keras cannot rematerialise the layers of this model in a compiled step"
    elif variant.precision is not None:
        why = f"a part of it does not compute in {variant.precision}"
    elif variant.jit_compile is not None:
        why = f"it does not run with XLA {'on' if variant.jit_compile else 'off'}"
    else:
        why = "it does not run with another optimizer"
    return f"{why} (the error is {said})"


def _figures(plain: Remedy, measured: Measured, base: Report, variant: Variant) -> Remedy:
    report = measured.report
    trial = report.decisive_trial
    return dataclasses.replace(
        plain,
        code=plain.code.replace(_remat_code(()), _remat_code(measured.rematerialised)),
        plan=report.plan,
        largest_fit=report.largest_fit,
        smallest_failure=report.smallest_failure,
        peak_bytes=None if trial is None else trial.peak_bytes,
        samples_per_second=None if trial is None else trial.samples_per_second,
        update_seconds=report.update_seconds,
        stopped_because=report.stopped_because,
        notes=tuple(warning for warning in report.warnings if warning not in base.warnings),
    )


def _combination(gaining: Sequence[tuple[Candidate, Remedy]]) -> tuple[Candidate | None, str]:
    """Return the best remedies of each kind as one; else None, and why."""
    best: dict[str, tuple[Candidate, Remedy]] = {}
    for candidate, remedy in gaining:
        kind = "precision" if candidate.variant.precision else candidate.name.partition(" ")[0]
        if kind not in best or _merit(remedy) > _merit(best[kind][1]):
            best[kind] = (candidate, remedy)
    chosen = [candidate for candidate, _ in best.values()]
    if not chosen:
        return None, "none of the remedies gains by itself"
    if len(chosen) == 1:
        return None, f"only {chosen[0].name} gains by itself"
    # The policy is set before the model is built, and the model is built before it is compiled.
    chosen.sort(key=lambda each: (not each.variant.precision, each.variant.jit_compile is not None))
    variant = Variant(
        precision=next((each.variant.precision for each in chosen if each.variant.precision), None),
        jit_compile=next((each.variant.jit_compile for each in chosen if each.variant.jit_compile is not None), None),
        rematerialise=next((each.variant.rematerialise for each in chosen if each.variant.rematerialise), None),
    )
    changes = "; ".join(each.changes_training for each in chosen if each.changes_training)
    code = "\n".join(each.code for each in chosen)
    return Candidate(" + ".join(each.name for each in chosen), code, changes, variant), ""


def _steadied(base: Report, again: Callable[[int], TrialResult]) -> Report:
    """Return ``base`` with its decisive trial run once more, where that was faster, and advice where it was far off.

    What else runs on a machine only ever slows steps down, so the faster run is the better measurement.
    """
    before = base.decisive_trial
    if before is None or not before.step_seconds:
        return base
    try:
        after = again(before.micro_batch)
    except AutobatchError as error:
        told = f"The model as it is could not be run once more, to see whether times are steady: {_first_line(error)}"
        return dataclasses.replace(base, advice=(*base.advice, told))
    if not after.fits or not after.step_seconds:
        return base
    if after.step_seconds < before.step_seconds:
        base = dataclasses.replace(base, trials=(*base.trials, after))
    ratio = max(after.step_seconds, before.step_seconds) / min(after.step_seconds, before.step_seconds)
    if ratio < UNSTEADY:
        return base
    told = (
        f"Times are not steady on this machine: the same step of {before.micro_batch} took "
        f"{format_seconds(before.step_seconds)}, and {format_seconds(after.step_seconds)} after the remedies were "
        f"tried. Differences in time of less than {ratio:.1f} times may be chance."
    )
    return dataclasses.replace(base, advice=(*base.advice, told))


def _merit(remedy: Remedy) -> tuple[float, float]:
    """Return the key that orders remedies that gain, the best last."""
    largest = float(remedy.largest_fit or 0)
    return (largest, 0.0) if remedy.update_seconds is None else (1 / max(remedy.update_seconds, 1e-9), largest)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
