"""The notebook: ``%autobatch``, records as HTML, and a display of a search while it runs.

IPython is imported in this room alone, and only in a shell that has it already. In a notebook the display is there from
the first use of autobatch on. ``%load_ext autobatch`` adds the magic. In a terminal's IPython it also adds the report
as text.
"""

from __future__ import annotations

import sys
from typing import Any

_shells: list[Any] = []
"""Shells that display autobatch's records."""

_unloaded: list[Any] = []
"""Shells from which the user has unloaded the extension; only loading it again puts anything there."""


def load(shell: Any) -> None:
    """Give ``shell`` the magic ``%autobatch`` and the display."""
    from autobatch.notebook import magic

    if shell in _unloaded:
        _unloaded.remove(shell)
    _display_in(shell)
    magic.register(shell)


def unload(shell: Any) -> None:
    """Remove from ``shell`` all that :func:`load` and :func:`attach` have put there."""
    from autobatch.notebook import formats, magic, progress

    magic.unregister(shell)
    formats.unregister(shell)
    progress.stop_watching()
    if shell in _shells:
        _shells.remove(shell)
    _unloaded.append(shell)


def attach() -> None:
    """Display in the notebook that this process is the kernel of, if it is one and did not unload the extension."""
    from autobatch.notebook.front_end import has_kernel

    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = None if get_ipython is None else get_ipython()
    if shell is not None and has_kernel(shell) and shell not in _unloaded:
        _display_in(shell)


def show_progress(shown: bool = True) -> None:
    """Show searches while they run, or stop doing so; ``fit(..., verbose=0)`` is silent in any case."""
    from autobatch.notebook import progress

    progress.shown = shown


def _display_in(shell: Any) -> None:
    from autobatch.notebook import formats, progress
    from autobatch.notebook.front_end import has_kernel

    if shell in _shells:
        return
    _shells.append(shell)
    formats.register(shell)
    if has_kernel(shell):
        progress.watch()
