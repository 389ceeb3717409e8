"""TensorFlow's side of batches, variables and snapshots of variables."""
