"""The frozen records that pass between the rooms of autobatch. Standard library only.

Bytes are ``int`` and seconds are ``float`` throughout, and a field's name ends in its unit. Out of memory is an
:class:`Outcome` here, a value; it is never an exception between rooms.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields

from autobatch import display
from autobatch.allocation_trace import AllocationTrace

SCHEMA_VERSION = 1
"""Version of the serialised :class:`Report`; a change of a field's meaning raises it."""


class Outcome(enum.Enum):
    """End of a trial."""

    FITS = "fits"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """Request to run one micro-batch size for real.

    ``timed_steps`` is the number of micro-steps timed after the first ones, which show that the size fits and pay for
    tracing and compilation. At 0 the seconds of the first ones serve: enough where no sizes compete for speed.
    """

    micro_batch: int
    timed_steps: int = 3
    record_allocations: bool = False

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, f"micro_batch must be at least 1. Received: {self.micro_batch!r}")
        _require(self.timed_steps >= 0, f"timed_steps must not be negative. Received: {self.timed_steps!r}")


@dataclass(frozen=True, slots=True)
class TrialResult:
    """Findings of one trial.

    ``peak_bytes`` is the most that was held on the device during the trial, None where the allocator keeps no such
    figure or the trial did not end. It counts what was asked for, where that was recorded. ``allocated_peak_bytes`` is
    the allocator's own figure, which counts the chunks that it gave. ``sample_peak_bytes`` is the peak up to the
    optimizer's update, whose needs do not depend on the size. ``held_bytes`` is what was held before the first sample.
    ``step_seconds`` is the median of one micro-batch's forward and backward pass with its accumulation,
    ``apply_seconds`` that of the optimizer's update. ``first_step_seconds`` is the time of the first micro-step with
    its tracing and compilation. ``requested_bytes`` is the allocation that a failure named, if it named one.
    ``retried`` is True if the size failed once while another process held memory, and was tried again. ``allocations``
    is what a size that fits asked of the allocator, if recorded.
    """

    micro_batch: int
    outcome: Outcome
    peak_bytes: int | None = None
    step_seconds: float | None = None
    apply_seconds: float | None = None
    first_step_seconds: float | None = None
    requested_bytes: int | None = None
    retried: bool = False
    detail: str = ""
    sample_peak_bytes: int | None = None
    held_bytes: int | None = None
    allocated_peak_bytes: int | None = field(default=None, metadata={"left_out_at_default": True})
    allocations: AllocationTrace | None = field(
        default=None, repr=False, compare=False, metadata={"left_out_at_default": True}
    )

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, f"micro_batch must be at least 1. Received: {self.micro_batch!r}")
        for item in fields(self):
            value = getattr(self, item.name)
            known = isinstance(value, (int, float))
            _require(not known or value >= 0, f"{item.name} must not be negative. Received: {value!r}")

    @property
    def fits(self) -> bool:
        """True if this size was run to its end within the budget."""
        return self.outcome is Outcome.FITS

    @property
    def samples_per_second(self) -> float | None:
        """Samples that pass through forward and backward in a second, or None where the trial was not timed."""
        if not self.step_seconds:
            return None
        return self.micro_batch / self.step_seconds


@dataclass(frozen=True, slots=True)
class SampleEstimate:
    """Needs of one sample, estimated from a step that was traced and not run.

    ``sample_bytes`` is roughly what it adds to the peak, good to a factor of two. ``largest_tensor_bytes`` is its share
    of the largest tensor, which an allocator must find room for in one piece. ``workspace_bytes`` are taken whatever
    the number of samples. ``is_compiled`` is True if XLA compiles the step: what that holds is not what was traced, and
    ``sample_bytes`` is good to a factor of four.
    """

    sample_bytes: float
    largest_tensor_bytes: float
    workspace_bytes: int = 0
    is_compiled: bool = False

    def __post_init__(self) -> None:
        _require(self.sample_bytes > 0, f"sample_bytes must be above 0. Received: {self.sample_bytes!r}")
        _require(
            self.largest_tensor_bytes >= 0,
            f"largest_tensor_bytes must not be negative. Received: {self.largest_tensor_bytes!r}",
        )
        _require(self.workspace_bytes >= 0, f"workspace_bytes must not be negative. Received: {self.workspace_bytes!r}")


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Straight line ``peak_bytes(b) = fixed_bytes + per_sample_bytes * b``."""

    fixed_bytes: float
    per_sample_bytes: float

    def __post_init__(self) -> None:
        _require(
            self.per_sample_bytes >= 0, f"per_sample_bytes must not be negative. Received: {self.per_sample_bytes!r}"
        )

    def peak_bytes(self, micro_batch: int) -> int:
        """Return the predicted peak of a micro-batch of this size, in bytes."""
        return int(self.fixed_bytes + self.per_sample_bytes * micro_batch)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Findings of a search: ``largest_fit`` was run and fits; ``smallest_failure`` was run and does not."""

    largest_fit: int | None
    smallest_failure: int | None
    trials: tuple[TrialResult, ...]
    memory_model: MemoryModel | None
    stopped_because: str
    headroom_given_up: bool = False  # since nothing fits beside it


@dataclass(frozen=True, slots=True)
class Plan:
    """Make-up of one optimizer update: ``accumulation_steps`` micro-batches of at most ``micro_batch`` samples.

    They are of even sizes (:attr:`micro_batches`). On several replicas each of them runs ``accumulation_steps``, and
    ``effective_batch`` counts the samples of all ``replicas``. Where streams are cut in proportion, sizes count those
    of the first, and are multiples of ``samples_in_portion``.
    """

    micro_batch: int
    accumulation_steps: int
    effective_batch: int
    replicas: int = field(default=1, metadata={"left_out_at_default": True})
    samples_in_portion: int = field(default=1, repr=False, metadata={"left_out_at_default": True})

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation_steps", "effective_batch", "replicas", "samples_in_portion"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1. Received: {getattr(self, name)!r}")
        at_once = self.micro_batch * self.replicas
        _require(
            (self.accumulation_steps - 1) * at_once < self.effective_batch <= self.accumulation_steps * at_once,
            "accumulation_steps must be ceil(effective_batch / micro_batch). "
            f"Received: {self.micro_batch=}, {self.accumulation_steps=}, {self.effective_batch=}, {self.replicas=}",
        )

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Micro-batches of an update in turn, on a replica with the largest share: sizes that differ by 1 at most.

        A search plans with ``micro_batch`` as the first of them. A ``micro_batch`` that was given may be larger: at 5,
        16 samples are (4, 4, 4, 4).
        """
        each = self.samples_in_portion
        smaller, larger_ones = divmod(-(-self.effective_batch // each // self.replicas), self.accumulation_steps)
        return ((smaller + 1) * each,) * larger_ones + (smaller * each,) * (self.accumulation_steps - larger_ones)


@dataclass(frozen=True, slots=True)
class Limit:
    """Number of bytes that may be used, and the source of that limit.

    ``enforced`` is True if the allocator itself refuses more. Otherwise a peak above the limit counts as out of memory
    although nothing failed.
    """

    limit_bytes: int | None
    source: str
    enforced: bool = False


@dataclass(frozen=True, slots=True)
class Environment:
    """Surroundings of the trials. ``budget_bytes`` is ``limit_bytes`` less the headroom; None is "no limit known".

    ``headroom`` is a share of the limit. ``headroom_bytes`` is None unless it was given in bytes.
    """

    device: str
    limit_bytes: int | None
    limit_source: str
    budget_bytes: int | None
    headroom: float
    precision: str
    jit_compile: bool
    versions: tuple[tuple[str, str], ...] = ()
    held_by_others_bytes: int = field(default=0, metadata={"left_out_at_default": True})  # before the first trial
    headroom_bytes: int | None = field(default=None, metadata={"left_out_at_default": True})


@dataclass(frozen=True, slots=True)
class Recovery:
    """One time that training ran out of memory and went on.

    ``update`` is the optimizer update that was under way (0-based, counted from the start of this fit), ``phase`` is
    "train" or "validation". ``micro_batch_after`` equals ``micro_batch_before`` if the update ran out of memory beside
    copies of the weights: it runs again without them. Where ``phase`` is "restart", the process before this one died,
    and ``autobatch run`` has started the script again; ``detail`` says what was seen.
    """

    update: int
    phase: str
    micro_batch_before: int
    micro_batch_after: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HostUse:
    """One thing that the input pipeline will hold in host memory: its name in words, and at least how much."""

    name: str
    held_bytes: int

    def __post_init__(self) -> None:
        _require(self.held_bytes >= 0, f"held_bytes must not be negative. Received: {self.held_bytes!r}")


@dataclass(frozen=True, slots=True)
class Variant:
    """Variant of a model, built or compiled in another way; None and False leave the model as it is.

    ``precision`` is a Keras dtype policy that is set before the model is built. ``jit_compile`` turns XLA on or off.
    ``rematerialise`` builds it under ``keras.RematScope``, for whole "layers" or for their "activations".
    ``slotless_optimizer`` gives it an SGD without momentum.
    """

    precision: str | None = None
    jit_compile: bool | None = None
    rematerialise: str | None = None
    slotless_optimizer: bool = False

    def __post_init__(self) -> None:
        _require(
            self.rematerialise in (None, "layers", "activations"),
            f'rematerialise must be None, "layers" or "activations". Received: {self.rematerialise!r}',
        )


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to larger micro-batches or shorter updates, as measured on this model; compare it with the report.

    ``code`` is the line that does it. ``changes_training`` says how training will then differ, empty where it does not.
    ``why_not`` says why nothing was measured, empty where it was. ``plan``, ``largest_fit`` and ``smallest_failure``
    are as in :class:`Report`. ``peak_bytes`` and ``samples_per_second`` are those of the planned micro-batch, or of the
    largest where there is no plan. ``update_seconds`` is one update at the target. ``notes`` are warnings of this
    variant's report that the model as it is does not have. ``recommended`` marks the one that gains most of those that
    keep the optimizer.
    """

    name: str
    code: str
    changes_training: str = ""
    keeps_optimizer: bool = True
    why_not: str = ""
    plan: Plan | None = None
    largest_fit: int | None = None
    smallest_failure: int | None = None
    peak_bytes: int | None = None
    samples_per_second: float | None = None
    update_seconds: float | None = None
    stopped_because: str = ""
    notes: tuple[str, ...] = field(default=())
    recommended: bool = False

    @property
    def measured(self) -> bool:
        """True if the model was really run with this remedy."""
        return not self.why_not


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known after a search. ``plan`` is None where no target batch was given.

    ``remedies`` are empty where none were asked for; ``advice`` is what the measurements say beyond them.
    """

    plan: Plan | None
    largest_fit: int | None
    smallest_failure: int | None
    trials: tuple[TrialResult, ...] = field(repr=False)
    memory_model: MemoryModel | None
    environment: Environment = field(repr=False)
    stopped_because: str
    model_name: str = ""
    warnings: tuple[str, ...] = field(default=())
    host_uses: tuple[HostUse, ...] = field(default=(), repr=False)
    remedies: tuple[Remedy, ...] = field(default=(), repr=False)
    advice: tuple[str, ...] = field(default=())
    schema_version: int = SCHEMA_VERSION

    @property
    def decisive_trial(self) -> TrialResult | None:
        """Trial that the report is about: that of the planned micro-batch, or else of the largest that fits."""
        micro_batch = self.plan.micro_batch if self.plan else self.largest_fit
        fitting = [trial for trial in self.trials if trial.fits and trial.micro_batch == micro_batch]
        # A size may have been run more than once; the last run is the one that the search ended on.
        return fitting[-1] if fitting else None

    @property
    def update_seconds(self) -> float | None:
        """Seconds of one optimizer update of the plan: micro-batches and apply; None where the trial was not timed."""
        trial = self.decisive_trial
        if self.plan is None or trial is None or trial.step_seconds is None:
            return None
        return self.plan.accumulation_steps * trial.step_seconds + (trial.apply_seconds or 0.0)

    def __str__(self) -> str:
        """Write this report as plain text, as ``autobatch.render(report, "text")`` does."""
        return str(display.report_format("text").render(self))

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return this report as JSON, which :meth:`from_json` reads back; ``report/json.py`` describes the format."""
        return str(display.report_format("json").render(self, indent=indent))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return an equal report from what :meth:`to_json`, or ``autobatch report --format json``, wrote.

        Raises:
            ValueError: ``text`` is no report, or comes from a newer autobatch.
        """
        report: Report = display.report_format("json").load(text)
        return report
