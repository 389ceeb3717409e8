"""Find what cannot be exact under accumulation, and say it by name before training."""
