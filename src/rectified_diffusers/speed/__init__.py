"""The switches of `optimize`, one per file: each is a context manager that leaves what it changed as it was."""
