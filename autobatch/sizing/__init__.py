"""Search with trials, a memory of what was found, and reports of it."""
