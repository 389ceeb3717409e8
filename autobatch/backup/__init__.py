"""Backups of a training, from which the same call goes on behind the last update that was kept."""
