"""The report as JSON, and back: the format in which reports are kept.

The keys are the records' field names, ``schema_version`` first. An enumeration is written as its value, a tuple as a
list, an unknown as an explicit ``null``. Reading back gives an equal :class:`~autobatch.records.Report`. Keys that this
version does not know are passed over, and fields that have a default may be missing. So a new field needs no new schema
version.
"""

from __future__ import annotations

import json

from autobatch.record_codec import decode_record, encode
from autobatch.records import SCHEMA_VERSION, Report


def render(report: Report, *, indent: int | None = 2) -> str:
    """Return the report as a JSON object, ASCII only."""
    fields = encode(report)
    assert isinstance(fields, dict)
    ordered = {"schema_version": fields.pop("schema_version"), **fields}
    return json.dumps(ordered, indent=indent, allow_nan=False)


def load(text: str) -> Report:
    """Read what :func:`render` wrote, in this version or an older one.

    Raises:
        ValueError: ``text`` is no JSON, is no report, or comes from a newer autobatch; the message names the field.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"This is not JSON: {error}") from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ValueError("This is not an autobatch report: it has no schema_version.")
    version = data["schema_version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"schema_version: expected a whole number above 0. Received: {version!r}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"This report has schema_version {version}, and this autobatch reads up to {SCHEMA_VERSION}. "
            "Upgrade autobatch to open it."
        )
    return decode_record(Report, data, "")
