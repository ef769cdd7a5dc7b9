"""The only place where a frontier advances."""
