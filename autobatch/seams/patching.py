"""What all that replaces a piece of Keras or TensorFlow for a while has in common."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

PATCHING = threading.RLock()
"""Held while something of Keras's is replaced, so that fits on several threads do not put each other's back."""


_HERE = threading.local()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """While this lasts, what was replaced before it on this thread is the original; what is replaced within it is not.

    A metric that is updated for the whole batch must find Keras as it is.
    """
    _HERE.depth = _depth() + 1
    try:
        yield
    finally:
        _HERE.depth -= 1


def _depth() -> int:
    return getattr(_HERE, "depth", 0)


def on_this_thread(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """``replacement`` for the thread that calls this, ``original`` for all others, which train as ever.

    Under a strategy each replica is traced on a thread of its own, and what it replaces is replaced there.
    """
    thread, depth = threading.get_ident(), _depth()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        replaced = threading.get_ident() == thread and _depth() == depth
        return (replacement if replaced else original)(*args, **kwargs)

    return call
