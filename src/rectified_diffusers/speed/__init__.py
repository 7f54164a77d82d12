"""The switches of `optimize`, one per file: each is a context manager that undoes its changes on exit."""
