"""Reports made by hand, which the renderers are tested on."""

from __future__ import annotations

import dataclasses

import pytest

from autobatch.records import Environment, HostUse, Limit, MemoryModel, Outcome, Plan, Remedy, Report, TrialResult

MIB = 2**20
NASTY = "net<script>alert('1')</script>&\"\x1b[31mred\x07 [bold]x[/bold] :smile: \u202e"


def fits(micro_batch: int, peak_mib: float, step_seconds: float) -> TrialResult:
    return TrialResult(micro_batch, Outcome.FITS, int(peak_mib * MIB), step_seconds, 0.002, step_seconds + 3.0)


def environment(limit_mib: int | None = 512) -> Environment:
    limit = (
        Limit(None, "no limit known") if limit_mib is None else Limit(limit_mib * MIB, "TensorFlow's CPU arena", True)
    )
    return Environment(
        device="CPU:0",
        limit_bytes=limit.limit_bytes,
        limit_source=limit.source,
        budget_bytes=None if limit.limit_bytes is None else int(limit.limit_bytes * 0.95),
        headroom=0.05,
        precision="float32",
        jit_compile=False,
        versions=(("TensorFlow", "2.21.0"), ("Keras", "3.15.1")),
    )


FULL = Report(
    plan=Plan(64, 4, 256),
    largest_fit=64,
    smallest_failure=128,
    trials=(
        fits(2, 18.5, 0.011),
        fits(8, 55.4, 0.021),
        TrialResult(128, Outcome.OUT_OF_MEMORY, requested_bytes=98 * MIB, detail="OOM when allocating tensor"),
        fits(64, 401, 0.126),
        TrialResult(96, Outcome.TIMED_OUT, retried=True, detail="did not finish within 600 s"),
    ),
    memory_model=MemoryModel(6.2 * MIB, 6.17 * MIB),
    environment=environment(),
    stopped_because="no size between 64 and 96 changes the accumulation steps",
    model_name="small_cnn",
    warnings=("BatchNormalization sees micro-batches of 64, not 256.",),
)

NOTHING_FITS = Report(
    plan=None,
    largest_fit=None,
    smallest_failure=1,
    trials=(TrialResult(1, Outcome.OUT_OF_MEMORY),),
    memory_model=None,
    environment=environment(),
    stopped_because="not even one sample fits",
)

BARE = Report(
    plan=None,
    largest_fit=1,
    smallest_failure=None,
    trials=(TrialResult(1, Outcome.FITS),),
    memory_model=None,
    environment=environment(None),
    stopped_because="",
)

WHOLE_TARGET = Report(
    plan=Plan(100, 1, 100),
    largest_fit=100,
    smallest_failure=None,
    trials=(fits(100, 700, 0.2),),
    memory_model=None,
    environment=environment(),
    stopped_because="the whole target fits",
    model_name="above_its_limit",
)

_POLICY = 'keras.mixed_precision.set_global_policy("mixed_bfloat16")  # before the model is built'
_SCOPE = "with keras.RematScope(mode=\"list_of_layers\", layer_names=['block_1', 'block_2']):\n    model = build()"
_XLA = "model.compile(..., jit_compile=True)"

REMEDIED = dataclasses.replace(
    FULL,
    model_name="small_cnn_remedied",
    host_uses=(HostUse("shuffle(10000)", 4096 * MIB),),
    advice=("The input pipeline will hold 4 GiB of the host's 16 GiB (25 %), most of it in shuffle(10000).",),
    remedies=(
        Remedy(
            "mixed_bfloat16",
            _POLICY,
            "activations and gradients with 8 bits of mantissa; the weights stay float32",
            plan=Plan(128, 2, 256),
            largest_fit=128,
            smallest_failure=256,
            peak_bytes=410 * MIB,
            samples_per_second=700.0,
            update_seconds=0.37,
            stopped_because="limit of 60 s reached",
        ),
        Remedy(
            "mixed_float16", _POLICY.replace("bfloat16", "float16"), why_not="does not apply: the model fails with it"
        ),
        Remedy("XLA on", _XLA, "", True, "", Plan(64, 4, 256), 64, 86, 390 * MIB, 900.0, 0.29, "proven"),
        Remedy(
            "rematerialised layers", _SCOPE, "", True, "", Plan(86, 3, 256), 86, 128, 450 * MIB, 350.0, 0.74, "proven"
        ),
        Remedy(
            "optimizer without slots",
            "model.compile(keras.optimizers.SGD(learning_rate), loss)",
            "another optimizer: tune its learning rate anew",
            False,
            smallest_failure=1,
            stopped_because="not even one sample fits",
        ),
        Remedy(
            "mixed_bfloat16 + XLA on",
            f"{_POLICY}\n{_XLA}",
            "activations and gradients with 8 bits of mantissa",
            True,
            "",
            Plan(256, 1, 256),
            256,
            None,
            500 * MIB,
            1800.0,
            0.142,
            "the whole target fits",
            ("Dropout (a) draws other random numbers.",),
            True,
        ),
    ),
)

EMPTY = Report(None, None, None, (), None, environment(None), "")

HOSTILE = Report(
    plan=Plan(3, 4, 11),
    largest_fit=3,
    smallest_failure=4,
    trials=(fits(3, 100, 0.5), TrialResult(4, Outcome.OUT_OF_MEMORY, detail=NASTY)),
    memory_model=MemoryModel(-5.0 * MIB, 40 * MIB),
    environment=Environment(NASTY, 512 * MIB, NASTY, 500 * MIB, 0.05, NASTY, True, ((NASTY, NASTY),)),
    stopped_because=NASTY,
    model_name=NASTY,
    warnings=(NASTY,),
    remedies=(
        Remedy(
            NASTY, NASTY + "\n    indented", NASTY, True, "", Plan(3, 4, 11), 3, 4, 9, 1.0, 2.0, NASTY, (NASTY,), True
        ),
        Remedy(NASTY, NASTY, why_not=NASTY),
    ),
    advice=(NASTY,),
)

REPORTS = {
    "full": FULL,
    "nothing_fits": NOTHING_FITS,
    "bare": BARE,
    "whole_target": WHOLE_TARGET,
    "remedied": REMEDIED,
    "empty": EMPTY,
    "hostile": HOSTILE,
}


@pytest.fixture(params=REPORTS, name="report_name")
def _report_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def report(report_name: str) -> Report:
    return REPORTS[report_name]


@pytest.fixture
def full() -> Report:
    return FULL


@pytest.fixture
def remedied() -> Report:
    return REMEDIED


@pytest.fixture
def hostile() -> Report:
    return HOSTILE
