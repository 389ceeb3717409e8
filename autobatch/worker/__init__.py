"""Trials in a process of their own."""
