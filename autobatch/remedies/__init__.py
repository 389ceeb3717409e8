"""Measurement of what may make a model fit better."""
