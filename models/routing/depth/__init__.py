"""The controls of `routing.depth`, one per file."""
