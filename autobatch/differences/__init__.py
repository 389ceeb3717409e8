"""Differences that accumulation cannot avoid, found and named before training."""
