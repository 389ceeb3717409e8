"""Keras's progress bar: whether it stands on a line that is not ended.

Private: ``keras.callbacks.ProgbarLogger.progbar`` and ``Progbar._prev_total_width``, the width of what was drawn last.
Where they are missing, a line of ours may begin behind the bar.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras


def is_open(callbacks: Iterable[Any]) -> bool:
    """Return True if a bar among ``callbacks`` was drawn in this epoch, and will be drawn again over itself."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.ProgbarLogger) and callback.verbose == 1:
            return bool(getattr(getattr(callback, "progbar", None), "_prev_total_width", 0))
    return False
