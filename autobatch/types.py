"""Names for what Keras and TensorFlow give no types for, so that a signature says what is meant.

Each is ``Any`` to a type checker: both libraries ship without the types that strict checking needs, and importing them
here would cost seconds.
"""

from __future__ import annotations

from typing import Any

Model = Any
"""A ``keras.Model``."""

Layer = Any
"""A ``keras.layers.Layer``."""

Optimizer = Any
"""A ``keras.optimizers.Optimizer``."""

Metric = Any
"""A ``keras.metrics.Metric``."""

Variable = Any
"""A ``keras.Variable`` or a ``tf.Variable``, one that a strategy mirrors included."""

Tensor = Any
"""A ``tf.Tensor``, dense, ragged or sparse, or the ``tf.IndexedSlices`` of a gradient."""

Graph = Any
"""A ``tf.Graph``."""

Operation = Any
"""A ``tf.Operation``."""

Dataset = Any
"""A ``tf.data.Dataset``."""

Strategy = Any
"""A ``tf.distribute.Strategy``."""

ElementSpec = Any
"""A nest of type specs, such as ``tf.TensorSpec``, of a batch of any size."""

Batch = Any
"""A nest of tensors whose first dimension counts samples: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``."""
