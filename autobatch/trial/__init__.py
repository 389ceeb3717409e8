"""Run trials on the live model, and leave no trace."""
