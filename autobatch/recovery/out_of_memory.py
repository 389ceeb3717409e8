"""Exceptions that may mean out of memory."""

from __future__ import annotations

import tensorflow as tf

# What TensorFlow and NumPy raise when memory runs out, and much else: memory.oom tells which it was.
CAUGHT = (tf.errors.OpError, MemoryError)
