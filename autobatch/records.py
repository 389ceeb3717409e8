"""The frozen records that pass between the rooms of autobatch. Standard library only.

Bytes are ``int`` and seconds are ``float`` throughout, and a field's name ends in its unit. Out of memory is an
:class:`Outcome` here, a value; it is never an exception between rooms.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

SCHEMA_VERSION = 1
"""Version of the serialised :class:`Report`; a change of a field's meaning raises it."""


class Outcome(enum.Enum):
    """How a trial ended."""

    FITS = "fits"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """Ask for one micro-batch size to be run for real.

    ``timed_steps`` is how many micro-steps are timed once the first one has paid for tracing and compilation.
    """

    micro_batch: int
    timed_steps: int = 3

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, f"micro_batch must be at least 1. Received: {self.micro_batch!r}")
        _require(self.timed_steps >= 1, f"timed_steps must be at least 1. Received: {self.timed_steps!r}")


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What one trial showed.

    ``peak_bytes`` is the most that the device's allocator held during the trial, None where it keeps no such figure
    or the trial did not end. ``step_seconds`` is the median of one micro-batch's forward and backward pass with its
    accumulation, ``apply_seconds`` of the optimizer's update, ``first_step_seconds`` of the first micro-step with its
    tracing and compilation. ``requested_bytes`` is the allocation that a failure named, if it named one.
    ``retried`` tells that the size failed once while another process held memory, and was tried again.
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

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, f"micro_batch must be at least 1. Received: {self.micro_batch!r}")
        for name in ("peak_bytes", "step_seconds", "apply_seconds", "first_step_seconds", "requested_bytes"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} must not be negative. Received: {value!r}")

    @property
    def fits(self) -> bool:
        """Whether this size was run to its end within the budget."""
        return self.outcome is Outcome.FITS

    @property
    def samples_per_second(self) -> float | None:
        """Samples that pass through forward and backward in a second, or None where the trial was not timed."""
        if not self.step_seconds:
            return None
        return self.micro_batch / self.step_seconds


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """The straight line ``peak_bytes(b) = fixed_bytes + per_sample_bytes * b``."""

    fixed_bytes: float
    per_sample_bytes: float

    def __post_init__(self) -> None:
        _require(
            self.per_sample_bytes >= 0, f"per_sample_bytes must not be negative. Received: {self.per_sample_bytes!r}"
        )

    def peak_bytes(self, micro_batch: int) -> int:
        """The predicted peak of a micro-batch of this size, in bytes."""
        return int(self.fixed_bytes + self.per_sample_bytes * micro_batch)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found: ``largest_fit`` was run and fits; ``smallest_failure`` was run and does not."""

    largest_fit: int | None
    smallest_failure: int | None
    trials: tuple[TrialResult, ...]
    memory_model: MemoryModel | None
    stopped_because: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How one optimizer update is made up: ``accumulation_steps`` micro-batches of at most ``micro_batch`` samples.

    On several replicas each of them runs so many; ``effective_batch`` counts the samples of all ``replicas``.
    """

    micro_batch: int
    accumulation_steps: int
    effective_batch: int
    replicas: int = field(default=1, metadata={"left_out_at_default": True})

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation_steps", "effective_batch", "replicas"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1. Received: {value!r}")
        at_once = self.micro_batch * self.replicas
        _require(
            (self.accumulation_steps - 1) * at_once < self.effective_batch <= self.accumulation_steps * at_once,
            "accumulation_steps must be ceil(effective_batch / micro_batch). "
            f"Received: {self.micro_batch=}, {self.accumulation_steps=}, {self.effective_batch=}, {self.replicas=}",
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes may be used, and who says so.

    ``enforced`` tells that the allocator itself refuses more; otherwise a peak above the limit counts as out of
    memory although nothing failed.
    """

    limit_bytes: int | None
    source: str
    enforced: bool = False


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the trials ran. ``budget_bytes`` is ``limit_bytes`` less the headroom; None is "no limit known"."""

    device: str
    limit_bytes: int | None
    limit_source: str
    budget_bytes: int | None
    headroom: float
    precision: str
    jit_compile: bool
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Recovery:
    """One time that training ran out of memory and went on.

    ``update`` is the optimizer update that was under way (0-based, counted from the start of this fit), ``phase`` is
    "train" or "validation".
    """

    update: int
    phase: str
    micro_batch_before: int
    micro_batch_after: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HostUse:
    """One thing that the input pipeline will hold in host memory: what it is, in words, and at least how much."""

    name: str
    held_bytes: int

    def __post_init__(self) -> None:
        _require(self.held_bytes >= 0, f"held_bytes must not be negative. Received: {self.held_bytes!r}")


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known after a search. ``plan`` is None where no target batch was given."""

    plan: Plan | None
    largest_fit: int | None
    smallest_failure: int | None
    trials: tuple[TrialResult, ...]
    memory_model: MemoryModel | None
    environment: Environment
    stopped_because: str
    model_name: str = ""
    warnings: tuple[str, ...] = field(default=())
    host_uses: tuple[HostUse, ...] = field(default=())
    schema_version: int = SCHEMA_VERSION
