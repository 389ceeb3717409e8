"""Train any Keras model at any batch size, in whatever memory there is.

The public names are loaded when they are first used: ``import autobatch`` imports no TensorFlow, so that
:func:`limit_memory` and :func:`configure_memory` can be called before TensorFlow starts its devices.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from autobatch import display
from autobatch.version import __version__ as __version__

if TYPE_CHECKING:
    from autobatch.api import fit, tune, wrap_step
    from autobatch.errors import (
        AutobatchError,
        AutobatchWarning,
        FixedBatchSizeError,
        NoFeasibleBatchError,
        UpdateInterruptedError,
        WorkerLostError,
        WorkersDisagreeError,
    )
    from autobatch.memory.arena import configure_memory, limit_memory
    from autobatch.records import MemoryModel, Outcome, Plan, Recovery, Report, TrialResult
    from autobatch.report import render
    from autobatch.training_history import TrainingHistory
    from autobatch.watch.memory_watch import MemoryWatch

_HOME = {
    "AutobatchError": "autobatch.errors",
    "AutobatchWarning": "autobatch.errors",
    "FixedBatchSizeError": "autobatch.errors",
    "MemoryModel": "autobatch.records",
    "MemoryWatch": "autobatch.watch.memory_watch",
    "NoFeasibleBatchError": "autobatch.errors",
    "Outcome": "autobatch.records",
    "Plan": "autobatch.records",
    "Recovery": "autobatch.records",
    "Report": "autobatch.records",
    "TrainingHistory": "autobatch.training_history",
    "TrialResult": "autobatch.records",
    "UpdateInterruptedError": "autobatch.errors",
    "WorkerLostError": "autobatch.errors",
    "WorkersDisagreeError": "autobatch.errors",
    "configure_memory": "autobatch.memory.arena",
    "fit": "autobatch.api",
    "limit_memory": "autobatch.memory.arena",
    "render": "autobatch.report",
    "tune": "autobatch.api",
    "wrap_step": "autobatch.api",
}

__all__ = [
    "AutobatchError",
    "AutobatchWarning",
    "FixedBatchSizeError",
    "MemoryModel",
    "MemoryWatch",
    "NoFeasibleBatchError",
    "Outcome",
    "Plan",
    "Recovery",
    "Report",
    "TrainingHistory",
    "TrialResult",
    "UpdateInterruptedError",
    "WorkerLostError",
    "WorkersDisagreeError",
    "configure_memory",
    "fit",
    "limit_memory",
    "render",
    "tune",
    "wrap_step",
]


def _report_format(name: str) -> Any:
    from autobatch.report import RENDERERS

    return RENDERERS[name]


# Done here, since this runs before every other module of the package and alone may know all rooms. So whoever holds a
# record can print it. The formats are still loaded when they are first used.
display.report_format = _report_format


def _show_search(trials: Any, search: Any) -> Any:
    from autobatch.cli import search_display

    return search_display.shown(trials, search)


# A notebook puts its own in the place of this.
display.show_search = _show_search


def load_ipython_extension(shell: Any) -> None:
    """Give the shell the magic and the display, as ``%load_ext autobatch`` asks."""
    from autobatch import notebook

    notebook.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take the magic and the display out of the shell, as ``%unload_ext autobatch`` asks."""
    from autobatch import notebook

    notebook.unload(shell)


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    if "IPython" in sys.modules:
        from autobatch import notebook

        notebook.attach()
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
