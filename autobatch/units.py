"""Bytes and seconds as people write and read them. Standard library only."""

from __future__ import annotations

import math
import re

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MOST_BYTES = 2**63 - 1  # what TensorFlow and the drivers count with
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: int | str, *, name: str = "memory_limit") -> int:
    """Turn ``536870912``, ``"512MiB"`` or ``"1.5GB"`` into bytes.

    kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB powers of 1024; a bare number is bytes.

    Raises:
        TypeError: ``value`` is neither an int nor a str.
        ValueError: it cannot be read, or is not above zero, or is more than any machine can count.
    """
    remedy = f'{name} is a number of bytes above 0, or text such as "512MiB" or "1.5GB".'
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{remedy} Received: {value!r} (of type {type(value).__name__})")
    if isinstance(value, int):
        size = value
    else:
        match = _PATTERN.fullmatch(value)
        factor = _FACTORS.get(match.group(2).lower()) if match else None
        number = float(match.group(1)) * factor if match and factor else math.nan
        if not math.isfinite(number):  # as with more digits than there are floats
            raise ValueError(f"{remedy} Received: {value!r}")
        size = int(number)
    if size > _MOST_BYTES:
        raise ValueError(f"{name} must be less than 8 EiB (2**63 bytes). Received: {value!r}")
    if size <= 0:
        raise ValueError(f"{remedy} Received: {value!r}")
    return size


def less_headroom(limit_bytes: int, headroom: float) -> int:
    """Return what of a limit may be used beside the ``headroom``: a share as a ``float``, bytes as an ``int``."""
    if isinstance(headroom, int):
        return max(0, limit_bytes - headroom)
    return int(limit_bytes * (1 - headroom))


def headroom_share(limit_bytes: int | None, headroom: float) -> float:
    """Return ``headroom`` as a share of the limit; 0 if it is bytes and no limit is known."""
    if not isinstance(headroom, int):
        return headroom
    return min(1.0, headroom / limit_bytes) if limit_bytes else 0.0


def format_bytes(size: float) -> str:
    """Write bytes as people read them: ``format_bytes(536870912) == "512 MiB"``."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            scaled = size / factor
            digits = 0 if abs(scaled) >= 100 or scaled == int(scaled) else 1
            return f"{scaled:.{digits}f} {unit}"
    return f"{int(size)} B"


def format_seconds(seconds: float) -> str:
    """Write seconds as people read them: ``format_seconds(0.0123) == "12.3 ms"``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min"
