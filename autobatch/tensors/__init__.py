"""Batches, variables and snapshots of variables, as TensorFlow has them."""
