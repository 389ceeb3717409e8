"""Running averages, advanced once an update by the effective batch's statistics."""
