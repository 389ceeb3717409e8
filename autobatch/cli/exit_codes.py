"""The command's exit codes, and the error for a command line that cannot be used."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
USER_CODE = 3
INTERRUPTED = 130


class UsageError(Exception):
    """An option that cannot be used, told in one line."""
