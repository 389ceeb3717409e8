"""What is in front of the user: a notebook, or a terminal."""

from __future__ import annotations

from autobatch.types import Model


def has_kernel(shell: Model) -> bool:
    """Return True if ``shell`` belongs to a kernel, and so has a front end that can show HTML and update it."""
    return getattr(shell, "kernel", None) is not None
