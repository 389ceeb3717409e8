"""What all that replaces a piece of Keras or TensorFlow for a while has in common."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

PATCHING = threading.RLock()
"""Held while something of Keras's is replaced, so that fits on several threads do not put each other's back."""


def on_this_thread(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """``replacement`` for the thread that calls this, ``original`` for all others, which train as ever.

    Under a strategy each replica is traced on a thread of its own, and what it replaces is replaced there.
    """
    thread = threading.get_ident()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == thread else original)(*args, **kwargs)

    return call
