"""Coding of any frozen record as JSON's objects, lists and numbers and back, with errors that name the field."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from typing import TypeVar

_T = TypeVar("_T")

# JSON has no word for these, yet a fitted line may hold them.
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def encode(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (field.metadata.get("left_out_at_default") and getattr(value, field.name) == field.default)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_record(record: type[_T], data: object, path: str) -> _T:
    if not isinstance(data, dict):
        raise _malformed(path, "an object", data)
    hints = typing.get_type_hints(record)
    values = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]  # every record is a dataclass
        where = f"{path}.{field.name}" if path else field.name
        if field.name in data:
            values[field.name] = _decode(hints[field.name], data[field.name], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the field is missing.")
    try:
        return record(**values)
    except ValueError as error:  # the record's own check
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def _decode(hint: object, data: object, path: str) -> object:
    """Return ``data`` as what the annotation ``hint`` of a record's field calls for."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if data is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, data, path)
    if typing.get_origin(hint) is tuple:
        return _decode_tuple(arguments, data, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(data)
        except ValueError as error:
            raise _malformed(path, "one of " + ", ".join(repr(member.value) for member in hint), data) from error
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return decode_record(hint, data, path)
    if hint is float:
        if isinstance(data, str) and data in _NOT_FINITE:
            return _NOT_FINITE[data]
        if isinstance(data, int) and not isinstance(data, bool):
            return _to_float(data, path)
        if isinstance(data, float):
            return data
        raise _malformed(path, "a number", data)
    if hint is int and (isinstance(data, bool) or not isinstance(data, int)):
        raise _malformed(path, "a whole number", data)
    if hint is bool and not isinstance(data, bool):
        raise _malformed(path, "true or false", data)
    if hint is str and not isinstance(data, str):
        raise _malformed(path, "text", data)
    assert hint in (int, bool, str), f"no rule to read {hint!r} from JSON"
    return data


def _decode_tuple(arguments: tuple[object, ...], data: object, path: str) -> tuple[object, ...]:
    if not isinstance(data, list):
        raise _malformed(path, "a list", data)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if len(data) != len(arguments):
        raise _malformed(path, f"a list of {len(arguments)}", data)
    return tuple(
        _decode(argument, item, f"{path}[{i}]") for i, (argument, item) in enumerate(zip(arguments, data, strict=True))
    )


def _to_float(data: int, path: str) -> float:
    try:
        return float(data)
    except OverflowError as error:
        raise _malformed(path, "a number that a float holds", data) from error


def _malformed(path: str, expected: str, data: object) -> ValueError:
    received = repr(data)
    shown = received if len(received) <= 80 else received[:77] + "..."
    return ValueError(f"{path or 'report'}: expected {expected}. Received: {shown}")
