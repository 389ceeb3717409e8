"""State as JSON beside arrays: nothing that is read back is executed.

:func:`pack_state` splits a nest of dicts, lists, tuples, plain values and arrays into what JSON can hold and the arrays
by name; :func:`unpack_state` joins them again. A tuple comes back as a list.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

ARRAY = "array"
"""Key of an object of JSON that stands for an array: its name, with the dtype and the shape that it has."""

_NUMBERS = "biufc"
"""Kinds of dtypes that a file of NumPy's describes by itself; others, as bfloat16, are kept as their bytes."""

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def pack_state(state: Any, arrays: dict[str, Any], name: str = "state") -> Any:
    """Return ``state`` as JSON can hold it, and add its arrays to ``arrays``.

    Raises:
        TypeError: something in it is neither a plain value nor an array; the message names its place.
    """
    if state is None or isinstance(state, (bool, int, str)):
        return state
    if isinstance(state, float):
        return state if math.isfinite(state) else {"float": str(float(state))}
    if isinstance(state, np.generic) and state.dtype.kind in _NUMBERS and state.dtype.itemsize <= 8:
        return {"scalar": pack_state(state.item(), arrays, name), "dtype": state.dtype.name}
    if hasattr(state, "__array__"):
        state = np.asarray(state)
        if state.dtype.kind in "OSU":
            raise TypeError(f"{name} is an array of {state.dtype}, which no backup can hold. Received: {state!r}")
        arrays[name] = _as_bytes(state) if state.dtype.kind not in _NUMBERS else state
        return {ARRAY: name, "dtype": state.dtype.name, "shape": list(state.shape)}
    if isinstance(state, dict):
        if not all(isinstance(key, str) for key in state):
            raise TypeError(f"{name} has keys that are no text. Received: {list(state)!r}")
        return {"dict": {key: pack_state(value, arrays, f"{name}/{key}") for key, value in state.items()}}
    if isinstance(state, (list, tuple)):
        return [pack_state(value, arrays, f"{name}/{place}") for place, value in enumerate(state)]
    raise TypeError(
        f"{name} can be kept in no backup: numbers, text, arrays, lists and dicts of them can. Received: {state!r}"
    )


def _as_bytes(array: Any) -> Any:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def unpack_state(packed: Any, arrays: Any) -> Any:
    """Return what :func:`pack_state` was given; ``arrays`` holds the arrays by name.

    Raises:
        KeyError, ValueError, TypeError: ``packed`` was not made by :func:`pack_state`, or an array is missing.
    """
    if isinstance(packed, list):
        return [unpack_state(value, arrays) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if ARRAY in packed:
        dtype = _dtype_of(packed["dtype"])
        array = arrays[packed[ARRAY]]
        return array if array.dtype == dtype else array.view(dtype).reshape(packed["shape"])
    if "scalar" in packed:
        return np.dtype(packed["dtype"]).type(unpack_state(packed["scalar"], arrays))
    if "float" in packed:
        return NOT_FINITE[packed["float"]]
    return {key: unpack_state(value, arrays) for key, value in packed["dict"].items()}


def _dtype_of(name: str) -> Any:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # TensorFlow's own: bfloat16 and the floats of 8 bits

        return np.dtype(getattr(ml_dtypes, name))


def to_bytes(state: Any) -> bytes:
    """Return ``state`` as bytes, which :func:`from_bytes` takes in another process.

    Raises:
        TypeError: as for :func:`pack_state`.
    """
    arrays: dict[str, Any] = {}
    packed = pack_state(state, arrays)
    described = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    head = json.dumps([packed, described]).encode()
    bodies = (np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return b"".join([len(head).to_bytes(8, "little"), head, *bodies])


def from_bytes(data: bytes) -> Any:
    """Return what :func:`to_bytes` was given; arrays are views of ``data``."""
    place = 8 + int.from_bytes(data[:8], "little")
    packed, described = json.loads(data[8:place])
    arrays = {}
    for name, dtype, shape in described:
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, dtype, count, place).reshape(shape)
        place += arrays[name].nbytes
    return unpack_state(packed, arrays)
