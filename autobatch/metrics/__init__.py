"""Metrics and logs with the values of the whole effective batch."""
