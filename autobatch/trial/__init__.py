"""Trials on the live model that leave no trace."""
