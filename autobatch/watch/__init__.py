"""The memory watch: growth from epoch to epoch, and its likely cause."""
