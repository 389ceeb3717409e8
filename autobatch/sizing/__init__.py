"""Search with trials, remember what was found, and report it."""
