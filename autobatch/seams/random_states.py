"""Private states of TensorFlow's random numbers: where eager operations draw their seeds, and the global generator.

Seen with TensorFlow 2.16 to 2.21; ``tests/seams/test_random_states.py`` fails when a piece moves.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as _context
from tensorflow.python.ops import stateful_random_ops as _stateful_random_ops

from autobatch.seams.patching import replaced


def eager_seeds() -> dict[str, Any]:
    """Return the seed of ``tf.random.set_seed`` and the state of what draws the seeds of operations from it."""
    context = _context.context()
    generator = getattr(context, "_rng", None)
    seed = context._seed
    return {
        "seed": None if seed is None else int(seed),
        "drawing": None if generator is None or seed is None else generator.getstate(),
    }


def continue_eager_seeds(state: dict[str, Any]) -> None:
    """Go on drawing seeds where :func:`eager_seeds` was called, in this process or another."""
    if state["drawing"] is None:
        return
    context = _context.context()
    context._seed = state["seed"]
    generator = random.Random()
    version, internal, gauss = state["drawing"]
    generator.setstate((version, tuple(internal), gauss))
    context._rng = generator


def global_generator_variables() -> list[Any]:
    """Return the state of ``tf.random.get_global_generator()``; an empty list before it exists."""
    generator = getattr(_stateful_random_ops, "global_generator", None)
    return [] if generator is None else [generator.state]


def shuffles_seeded_by(seed: Any) -> contextlib.AbstractContextManager[None]:
    """Let ``tf.random.shuffle`` without a seed take its order from the variable ``seed``, while the context is open.

    The first number that is shuffled counts as well, so that batches that are shuffled apart get orders of their own.
    """

    def seeded(original: Any) -> Any:
        def shuffle(value: Any, seed_of_call: Any = None, name: Any = None, **named: Any) -> Any:
            if seed_of_call is not None or named:
                return original(value, seed_of_call, name=name, **named)
            both = tf.stack([tf.cast(seed, tf.int64), tf.cast(value[0], tf.int64)])
            return tf.random.experimental.stateless_shuffle(value, seed=both)

        return shuffle

    return replaced(tf.random, "shuffle", seeded)
