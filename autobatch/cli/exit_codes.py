"""The command's exit codes, and the error for a command line that cannot be used."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
USER_CODE = 3
INTERRUPTED = 130


class UsageError(Exception):
    """The error for an option that cannot be used, with a message of one line."""
