"""Distinction between a trial that was too large and one that failed because another process took memory.

Others can change some limits: memory free on a card by NVML, or available on the host. Such a limit is looked at before
a trial and after it has failed. If it fell, others took what is missing, since what this process's allocator holds is
counted into the limit; see :mod:`autobatch.memory.limits`. Limits that nobody else can change, such as an arena's,
stay.
"""

from __future__ import annotations

from collections.abc import Callable

import tenacity

from autobatch.records import Limit
from autobatch.units import format_bytes

NOTABLE = 0.01
"""Least part of the limit whose loss can explain a failure: host memory never stands still."""

PATIENCE_SECONDS = 30.0
"""Seconds to wait for memory that others took."""

_LOOK_SECONDS = 1.0


def taken_since(before: Limit, limit_now: Callable[[], Limit], *, requested_bytes: int | None = None) -> str | None:
    """Return in words what others took since ``before``; None where it cannot be why a trial failed.

    It cannot be if it is too little, or if the allocation that failed asked for more than there was ``before``.
    """
    if before.limit_bytes is not None and (requested_bytes or 0) > before.limit_bytes:
        return None
    missing = _missing_bytes(before, limit_now())
    return None if missing is None else f"meanwhile another process took {format_bytes(missing)}"


def wait_until_back(
    before: Limit, limit_now: Callable[[], Limit], *, patience_seconds: float = PATIENCE_SECONDS
) -> bool:
    """Wait until the limit is nearly what it was, at the most ``patience_seconds``; return True if it is."""
    waiting = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda missing: missing is not None),
        stop=tenacity.stop_after_delay(patience_seconds),
        wait=tenacity.wait_fixed(min(_LOOK_SECONDS, patience_seconds)),
        retry_error_callback=lambda state: None if state.outcome is None else state.outcome.result(),
    )
    return waiting(lambda: _missing_bytes(before, limit_now())) is None


def _missing_bytes(before: Limit, now: Limit) -> int | None:
    if before.limit_bytes is None or now.limit_bytes is None:
        return None
    missing = before.limit_bytes - now.limit_bytes
    return missing if missing > NOTABLE * before.limit_bytes else None
