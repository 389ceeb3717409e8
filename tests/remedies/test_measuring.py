"""Which remedy gains, which are combined and which is recommended, on reports made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from autobatch.errors import NoFeasibleBatchError, NotApplicableError, UserCodeError, WorkerError
from autobatch.records import Environment, HostUse, Outcome, Plan, Remedy, Report, TrialResult, Variant
from autobatch.remedies import measuring
from autobatch.remedies.measuring import Measured

PRECISIONS = ("mixed_bfloat16", "mixed_float16")


def report(largest: int | None, step_seconds: float, *, target: int | None = 64, **environment: object) -> Report:
    fields = {"precision": "float32", "jit_compile": False, **environment}
    where = Environment("CPU:0", 1000, "stub", 950, 0.05, **fields)  # type: ignore[arg-type]
    if largest is None:
        return Report(None, None, 1, (TrialResult(1, Outcome.OUT_OF_MEMORY),), None, where, "nothing fits")
    plan = None if target is None else Plan(largest, -(-target // largest), target)
    trial = TrialResult(largest, Outcome.FITS, 900, step_seconds, 0.0)
    return Report(plan, largest, largest + 1, (trial,), None, where, "proven", model_name="stub")


BASE = report(16, 0.16)  # 100 samples a second, an update of 64 in 0.64 s


def measure(base: Report, gives: dict[str, object], again: TrialResult | None = None):
    """Measure with ``gives``: what each variant's report is, or what it raises; as it is otherwise."""
    asked: list[Variant] = []

    def run(variant: Variant) -> Measured:
        asked.append(variant)
        name = (
            variant.precision
            or {"layers": "remat", "activations": "activations", None: ""}[variant.rematerialise]
            or ("sgd" if variant.slotless_optimizer else "xla")
        )
        if sum(map(bool, dataclasses.astuple(variant))) > 1:
            name = "together"
        given = gives.get(name, base)
        if isinstance(given, Exception):
            raise given
        return Measured(given, ("a", "b") if variant.rematerialise else ())  # type: ignore[arg-type]

    said, found = measuring.measure(base, run, again=lambda size: again or base.trials[-1])
    return said, {remedy.name: remedy for remedy in found}, asked


def test_each_is_tried_by_itself_and_nothing_is_recommended_where_nothing_gains():
    base, found, asked = measure(BASE, {})
    assert base == BASE
    assert asked == [
        Variant(precision="mixed_bfloat16"),
        Variant(precision="mixed_float16"),
        Variant(jit_compile=True),
        Variant(rematerialise="layers"),
        Variant(rematerialise="activations"),
        Variant(slotless_optimizer=True),
    ]
    assert not any(remedy.recommended for remedy in found.values())
    assert found["best combination"].why_not == "none of the remedies gains by itself"
    assert found["XLA on"].code == "model.compile(..., jit_compile=True)"
    assert (found["XLA on"].largest_fit, found["XLA on"].samples_per_second) == (16, 100)
    assert found["XLA on"].update_seconds == pytest.approx(0.64)


def test_what_gains_in_the_update_is_combined_whatever_the_largest_size():
    gives = {
        "mixed_bfloat16": report(32, 0.40),  # larger, and slower: no gain at the target
        "mixed_float16": report(32, 0.20),
        "xla": report(8, 0.04),  # smaller, and faster: a gain
        "remat": report(64, 2.0),
        "sgd": report(64, 0.1),
        "together": report(32, 0.1),
    }
    _, found, asked = measure(BASE, gives)
    assert asked[-1] == Variant(precision="mixed_float16", jit_compile=True)
    together = found["mixed_float16 + XLA on"]
    assert together.recommended
    assert together.changes_training
    first, second = together.code.splitlines()
    assert first.startswith('keras.mixed_precision.set_global_policy("mixed_float16")')
    assert second == "model.compile(..., jit_compile=True)"


def test_an_optimizer_that_trains_differently_is_never_recommended():
    _, found, asked = measure(BASE, {"sgd": report(64, 0.1), "xla": report(32, 0.2)})
    assert found["optimizer without slots"].update_seconds == pytest.approx(0.1)
    assert not found["optimizer without slots"].recommended
    assert found["XLA on"].recommended
    assert found["best combination"].why_not == "only XLA on gains by itself"
    assert len(asked) == 6


def test_a_combination_may_be_worse_than_one_of_its_parts():
    gives = {"xla": report(32, 0.1), "remat": report(32, 0.2), "together": report(32, 0.3)}
    _, found, _ = measure(BASE, gives)
    assert found["XLA on"].recommended
    assert not found["rematerialised layers + XLA on"].recommended


def test_of_two_of_a_kind_the_better_is_combined():
    gives = {"remat": report(32, 0.25), "activations": report(32, 0.2), "xla": report(16, 0.1)}
    _, found, asked = measure(BASE, gives)
    assert asked[-1] == Variant(rematerialise="activations", jit_compile=True)
    code = found["rematerialised activations + XLA on"].code
    compile(code, "code", "exec")
    assert code.startswith('with keras.RematScope(mode="activations"):')


def test_without_a_target_the_largest_size_counts():
    base = report(16, 0.16, target=None)
    gives = {
        "mixed_bfloat16": report(30, 3.0, target=None),
        "mixed_float16": report(31, 9.0, target=None),
        "xla": report(16, 0.01, target=None),
    }
    _, found, _ = measure(base, gives)
    assert found["mixed_float16"].recommended
    assert found["XLA on"].update_seconds is None


def test_three_percent_is_no_gain():
    _, found, _ = measure(BASE, {"xla": report(16, 0.1565)})
    assert not found["XLA on"].recommended
    _, found, _ = measure(BASE, {"xla": report(16, 0.1545)})
    assert found["XLA on"].recommended


def test_whatever_fits_gains_where_the_model_as_it_is_does_not():
    _, found, _ = measure(report(None, 0.0), {"mixed_bfloat16": report(2, 1.0), "remat": report(4, 1.0)})
    assert found["mixed_bfloat16"].measured
    assert found["mixed_bfloat16 + rematerialised layers"].largest_fit is None
    assert found["rematerialised layers"].recommended  # the shorter update of the two


def test_why_a_remedy_does_not_apply():
    gives = {
        "mixed_bfloat16": NotApplicableError("the model's layers set their own"),
        "mixed_float16": NoFeasibleBatchError("not one sample"),
        "xla": UserCodeError("InvalidArgumentError: unsupported\nand more"),
        "remat": WorkerError("the worker went away"),
    }
    _, found, _ = measure(BASE, gives)
    assert found["mixed_bfloat16"].why_not == "does not apply: the model's layers set their own"
    assert found["mixed_float16"].measured
    assert (found["mixed_float16"].largest_fit, found["mixed_float16"].smallest_failure) == (None, 1)
    assert found["XLA on"].why_not == "does not apply: the model fails with it: InvalidArgumentError: unsupported"
    assert found["rematerialised layers"].why_not == "does not apply: the worker went away"
    assert not found["rematerialised layers"].measured


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("rematerialised layers", "remat", "Keras cannot rematerialise the layers of this model in a compiled step"),
        ("mixed_bfloat16", "mixed_bfloat16", "a part of it does not compute in mixed_bfloat16"),
        ("XLA on", "xla", "it does not run with XLA on"),
    ],
)
def test_an_error_within_keras_is_put_into_words(name, key, words):
    said = 'TypeError: can only concatenate list (not "RematMode") to list'
    _, found, _ = measure(BASE, {key: UserCodeError(said)})
    assert found[name].why_not == f"does not apply: the model fails with it: {words} (the error is {said})"


@pytest.mark.parametrize("policy", PRECISIONS)
def test_what_the_model_has_already_is_not_run(policy):
    base = report(16, 0.16, precision=policy, jit_compile=True)
    _, found, asked = measure(base, {})
    assert found[policy].why_not == "does not apply: the model has this policy already"
    assert policy not in [variant.precision for variant in asked]
    assert Variant(jit_compile=False) in asked
    assert found["XLA off"].code == "model.compile(..., jit_compile=False)"


def test_the_code_of_rematerialisation_names_the_layers():
    _, found, _ = measure(BASE, {"remat": report(32, 0.2)})
    lines = found["rematerialised layers"].code.splitlines()
    assert lines[0] == "with keras.RematScope(mode=\"list_of_layers\", layer_names=['a', 'b']):"
    assert lines[1] == "    model = build()"
    compile("\n".join(lines), "code", "exec")


def test_every_line_of_code_is_python():
    for candidate in measuring.candidates(BASE):
        compile(candidate.code, candidate.name, "exec")
    compile(measuring._remat_code([f"layer_{i}" for i in range(20)]), "remat", "exec")


def test_the_faster_of_two_runs_counts_and_a_great_difference_is_told():
    # The first run was disturbed: what seems to gain does not.
    quick = TrialResult(16, Outcome.FITS, 900, 0.08, 0.0)
    base, found, _ = measure(BASE, {"xla": report(16, 0.09)}, again=quick)
    assert base.update_seconds == pytest.approx(0.32)
    assert not found["XLA on"].recommended
    assert "Times are not steady" in base.advice[0]
    assert "less than 2.0 times" in base.advice[0]

    slow = TrialResult(16, Outcome.FITS, 900, 0.17, 0.0)
    base, _, _ = measure(BASE, {}, again=slow)
    assert base == BASE


def test_what_an_interrupt_leaves_out():
    done: list[Remedy] = []

    def run(variant: Variant) -> Measured:
        if variant.jit_compile is not None:
            raise KeyboardInterrupt
        return Measured(report(32, 0.2))

    with pytest.raises(KeyboardInterrupt):
        measuring.measure(BASE, run, again=lambda size: BASE.trials[0], on_remedy=done.append)
    found = measuring.unfinished(BASE, done)
    assert [remedy.measured for remedy in found] == [True, True, False, False, False, False, False]
    assert found[0].recommended
    assert {remedy.why_not for remedy in found[2:]} == {"not measured: interrupted"}


def test_what_is_told_before_each():
    told: list[tuple[str, int, int]] = []
    measuring.measure(
        BASE,
        lambda variant: Measured(report(32, 0.2)),
        again=lambda size: BASE.trials[0],
        on_start=lambda *words: told.append(words),
    )
    assert told[0] == ("mixed_bfloat16", 1, 7)
    assert [number for _, number, _ in told] == [1, 2, 3, 4, 5, 6, 7]
    assert told[-1][0].startswith("mixed_bfloat16 + ")


def test_advice_only_where_the_measurements_ask_for_it():
    assert measuring.advice(BASE, 10**9) == ()
    uses = (HostUse("shuffle(1000)", 400_000_000), HostUse("prefetch(2)", 1_000))
    busy = dataclasses.replace(BASE, host_uses=uses, trials=(dataclasses.replace(BASE.trials[0], retried=True),))
    growth, pipeline = measuring.advice(busy, 10**9)
    assert "configure_memory(growth=True)" in growth
    assert "381 MiB of the host's 954 MiB (40 %), most of it in shuffle(1000)" in pipeline
    assert len(measuring.advice(busy, 10**11)) == 1
    assert len(measuring.advice(busy, None)) == 1
