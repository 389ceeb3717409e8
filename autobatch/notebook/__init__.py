"""The notebook: ``%autobatch``, records as HTML, and a search that shows how it goes while it runs.

IPython is imported in this room alone, and only in a shell that has it already. In a notebook the display is there from
the first use of autobatch on; ``%load_ext autobatch`` adds the magic, and in a terminal's IPython it adds the report as
text.
"""

from __future__ import annotations

import sys
from typing import Any

from autobatch.types import Model

_shells: list[Any] = []
"""The shells that display what is ours."""

_unloaded: list[Any] = []
"""The shells where the user has unloaded the extension; nothing is put there again but by loading it."""


def load(shell: Model) -> None:
    """Give ``shell`` the magic ``%autobatch`` and the display."""
    from autobatch.notebook import magic

    if shell in _unloaded:
        _unloaded.remove(shell)
    _display_in(shell)
    magic.register(shell)


def unload(shell: Model) -> None:
    """Take out of ``shell`` all that :func:`load` and :func:`attach` have put there."""
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


def _display_in(shell: Model) -> None:
    from autobatch.notebook import formats, progress
    from autobatch.notebook.front_end import has_kernel

    if shell in _shells:
        return
    _shells.append(shell)
    formats.register(shell)
    if has_kernel(shell):
        progress.watch()
