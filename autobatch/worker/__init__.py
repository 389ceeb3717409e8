"""Run trials in a process of their own."""
