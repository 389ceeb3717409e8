"""The accumulated step, compiled. It divides, weighs, sums and updates; it does not handle running out of memory."""
