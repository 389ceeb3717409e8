"""Compile the accumulated step. It divides, weighs, sums and updates; it knows nothing of running out of memory."""
