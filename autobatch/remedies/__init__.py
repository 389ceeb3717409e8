"""Measure what may make a model fit better."""
