"""Messages between a worker process and its parent: frames of JSON, and the records in them."""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
from collections.abc import Mapping
from typing import Any

from autobatch.records import AllocationTrace, Environment, Outcome, TrialResult

logger = logging.getLogger(__name__)
Message = dict[str, Any]

_LENGTH = struct.Struct(">I")


def pack(message: Mapping[str, object]) -> bytes:
    """One frame: the length in four bytes, then JSON."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def unpack(buffer: bytearray) -> Message | None:
    """Take one whole frame off the front of ``buffer``; None while there is none."""
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    end = _LENGTH.size + length
    if len(buffer) < end:
        return None
    body = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    message = json.loads(body)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("a message is an object with a kind")
    return message


def pack_result(result: TrialResult) -> dict[str, object]:
    return {**dataclasses.asdict(result), "outcome": result.outcome.value}


def unpack_result(fields: Message) -> TrialResult:
    return TrialResult(
        **{**fields, "outcome": Outcome(fields["outcome"]), "allocations": _unpack_trace(fields["allocations"])}
    )


def _unpack_trace(trace: Any) -> AllocationTrace | None:
    """A trial's allocations; None where it tells none, or what cannot be: they are a hint, and the result stands."""
    try:
        return None if trace is None else AllocationTrace(**{name: _tuples(value) for name, value in trace.items()})
    except (AttributeError, TypeError, ValueError) as error:
        logger.info("allocations that a worker recorded are not believed: %r", error)
        return None


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def unpack_environment(fields: Message) -> Environment:
    return Environment(**{**fields, "versions": tuple((name, version) for name, version in fields["versions"])})
