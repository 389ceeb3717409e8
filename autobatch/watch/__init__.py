"""Watch memory from epoch to epoch, and name the likely cause of growth."""
