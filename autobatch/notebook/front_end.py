"""Front end that the user sees: a notebook, or a terminal."""

from __future__ import annotations

from typing import Any


def has_kernel(shell: Any) -> bool:
    """Return True if ``shell`` belongs to a kernel, and so has a front end that can show HTML and update it."""
    return getattr(shell, "kernel", None) is not None
