"""Give metrics and logs the values of the whole effective batch."""
