"""Size of the allocation that failed, read from an error message. Standard library only; decides nothing."""

from __future__ import annotations

import re

_SHAPE = re.compile(r"shape\s*\[(?P<shape>[\d,]*)\] and type (?P<dtype>\w+)")
_DTYPE_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8", "qint8", "quint8", "float8_e5m2", "float8_e4m3fn", "int4", "uint4"), 1),
    **dict.fromkeys(("half", "float16", "bfloat16", "int16", "uint16", "qint16", "quint16"), 2),
    **dict.fromkeys(("float", "float32", "int32", "uint32", "qint32"), 4),
    **dict.fromkeys(("double", "float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}

# "trying to allocate 400.00MiB (rounded to 419430400)requested by op": the allocator's log; the second is exact.
# "request for 1.00GiB (1073741824B)", "trying to allocate 1073741824 bytes", "allocate 96.00MiB.", "Unable to allocate
# 128. TiB for an array": XLA, Eigen, NumPy.
_ROUNDED = re.compile(r"\ballocate\b[^\n]{0,80}\(rounded to (?P<number>\d+)(?P<unit>)\)", re.IGNORECASE)
_EIGEN = re.compile(r"ran out of memory when allocating (?P<number>\d+)(?P<unit>)\b")
_BYTES = re.compile(
    r"\b(?:allocate|allocating|request for)\b[^\n]{0,80}?(?P<number>\b\d[\d,]*)\s?(?P<unit>)B(?:ytes)?\b", re.IGNORECASE
)
_SCALED = re.compile(
    r"\b(?:allocate|allocating|request for)\b[^\n]{0,80}?\b(?P<number>\d+(?:\.\d*)?)\s?(?P<unit>[KMGTPE])i?B\b",
    re.IGNORECASE,
)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def requested_bytes(message: str) -> int | None:
    """Return the size of the allocation that ``message`` names, in bytes; None if it names none."""
    match = _SHAPE.search(message)
    if match and match.group("dtype") in _DTYPE_BYTES:
        size = _DTYPE_BYTES[match.group("dtype")]
        for dimension in match.group("shape").split(","):
            size *= int(dimension or 1)
        return size
    for pattern in (_ROUNDED, _EIGEN, _BYTES, _SCALED):
        match = pattern.search(message)
        if match:
            # XLA, TensorFlow and NumPy all count in 1024s, whichever way they write the unit.
            factor = 1024 ** _POWERS[match.group("unit").upper()]
            return int(float(match.group("number").replace(",", "")) * factor)
    return None
