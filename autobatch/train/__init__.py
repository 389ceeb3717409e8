"""Keras's own ``fit``, or the user's own loop, with every step a transaction."""
