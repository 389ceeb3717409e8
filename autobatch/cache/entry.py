"""Remembered result of a search: enough to try its size again, and to go on training with its memory model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autobatch.records import MemoryModel

Column = int | float | str | None

_NO_YEAR_SECONDS = 2.5e11  # past the year 9000, which not every platform can write as a date
_LARGEST = 2**63 - 1  # what SQLite keeps as a whole number


@dataclass(frozen=True, slots=True)
class Remembered:
    """One search's result.

    ``micro_batch`` is the plan's, or the largest that fits where there was no target. ``peak_bytes`` is the peak of its
    trial. ``smallest_failure`` is kept for what it proves. ``is_bound`` is True if memory, not the target or the data,
    limited the size. ``limit_bytes`` is the limit that was in force, None where none was known. ``created_seconds`` is
    counted from 1970.
    """

    micro_batch: int
    largest_fit: int
    smallest_failure: int | None
    is_bound: bool
    limit_bytes: int | None
    peak_bytes: int | None
    memory_model: MemoryModel | None
    target_batch: int | None
    model_name: str
    device: str
    stopped_because: str
    created_seconds: float

    def __post_init__(self) -> None:
        for name in ("micro_batch", "largest_fit", "smallest_failure", "limit_bytes", "peak_bytes", "target_batch"):
            value = getattr(self, name)
            if value is None and name not in ("micro_batch", "largest_fit"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0. Received: {value!r}")
        if self.micro_batch > self.largest_fit or self.micro_batch > (self.target_batch or self.micro_batch):
            raise ValueError(f"micro_batch must be a size that fits and is of use. Received: {self!r}")
        if not 0 <= self.created_seconds < _NO_YEAR_SECONDS:
            raise ValueError(f"created_seconds must be a time since 1970. Received: {self.created_seconds!r}")

    def to_columns(self) -> dict[str, Column]:
        """Return the fields as SQLite columns: the memory model takes two, and an unknown limit is 0."""
        line = self.memory_model
        if line is not None and not (math.isfinite(line.fixed_bytes) and math.isfinite(line.per_sample_bytes)):
            line = None
        return {
            "limit_bytes": min(self.limit_bytes or 0, _LARGEST),
            "is_bound": int(self.is_bound),
            "created_seconds": self.created_seconds,
            "model_name": _storable(self.model_name),
            "device": _storable(self.device),
            "target_batch": self.target_batch,
            "micro_batch": self.micro_batch,
            "largest_fit": self.largest_fit,
            "smallest_failure": self.smallest_failure,
            "peak_bytes": self.peak_bytes,
            "fixed_bytes": None if line is None else line.fixed_bytes,
            "per_sample_bytes": None if line is None else line.per_sample_bytes,
            "stopped_because": _storable(self.stopped_because),
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, object]) -> Remembered:
        """Read what :meth:`to_columns` wrote. Every value is checked, for SQLite enforces no column's type.

        Raises:
            ValueError: the columns hold something else.
        """
        fixed, per_sample = columns["fixed_bytes"], columns["per_sample_bytes"]
        line = None
        if fixed is not None and per_sample is not None:
            line = MemoryModel(_finite(fixed), _finite(per_sample))
        fields: dict[str, object] = {name: columns[name] for name in _AS_THEY_ARE}
        return cls(
            **fields,  # type: ignore[arg-type]  # checked when the record is made
            is_bound=bool(columns["is_bound"]),
            limit_bytes=columns["limit_bytes"] or None,  # type: ignore[arg-type]
            memory_model=line,
            model_name=str(columns["model_name"]),
            device=str(columns["device"]),
            stopped_because=str(columns["stopped_because"]),
            created_seconds=_finite(columns["created_seconds"]),
        )


_AS_THEY_ARE = ("micro_batch", "largest_fit", "smallest_failure", "peak_bytes", "target_batch")


def _storable(text: str) -> str:
    """Replace the lone surrogates that a name may hold: SQLite takes no text with them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a number was expected. Received: {value!r}")
    return float(value)
