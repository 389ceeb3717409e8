"""Advance running averages once an update, by the effective batch's statistics."""
