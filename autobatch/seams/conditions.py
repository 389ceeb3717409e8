"""Replacement of the function behind ``tf.cond``, AutoGraph's branches and ``keras.ops.cond``.

Seen with TensorFlow 2.16 to 2.21. Without it a step that applies an optimizer in a branch is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from tensorflow.python.ops import cond_v2 as _cond_v2

from autobatch.seams.patching import replaced


def conditions_taken(
    take: Callable[[Callable[..., Any], Any, Callable[[], Any], Callable[[], Any]], Any],
) -> contextlib.AbstractContextManager[None]:
    """Call ``take(original, pred, true_fn, false_fn)`` in place of each traced condition, while the context is open."""

    def taken(original: Callable[..., Any]) -> Callable[..., Any]:
        def cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any], name: str = "cond") -> Any:
            return take(functools.partial(original, name=name), pred, true_fn, false_fn)

        return cond

    return replaced(_cond_v2, "cond_v2", taken)
