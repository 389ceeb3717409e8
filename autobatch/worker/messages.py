"""Messages between a worker process and its parent: frames of JSON, and the records in them."""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
from collections.abc import Mapping
from typing import Any

from autobatch.allocation_trace import AllocationTrace
from autobatch.record_codec import decode_record
from autobatch.records import Environment, HostUse, TrialResult

logger = logging.getLogger(__name__)
Message = dict[str, Any]

_LENGTH = struct.Struct(">I")


def pack(message: Mapping[str, object]) -> bytes:
    """Return one frame: the length in four bytes, then JSON."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def unpack(buffer: bytearray) -> Message | None:
    """Take one whole frame off the front of ``buffer`` and return its message; None while there is none."""
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


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """Message of a worker that its model is built and its trials are open."""

    environment: Environment
    largest_useful: int | None
    fixed_bytes_hint: int | None
    model_name: str
    warnings: tuple[str, ...]
    host_uses: tuple[HostUse, ...]
    fingerprint: str
    content: str
    rematerialised: tuple[str, ...]
    replicas: int
    samples_in_portion: int = 1
    takes_elements_whole: bool = False
    notes: tuple[str, ...] = ()


def decode_result(fields: Message) -> TrialResult:
    """Decode a trial's result.

    Its allocations are a hint. Where they cannot be, the result stands without them.
    """
    result = decode_record(TrialResult, {**fields, "allocations": None}, "result")
    if fields.get("allocations") is None:
        return result
    try:
        trace = decode_record(AllocationTrace, fields["allocations"], "allocations")
        return dataclasses.replace(result, allocations=trace)
    except ValueError as error:
        logger.info("allocations that a worker recorded are not believed: %r", error)
        return result
