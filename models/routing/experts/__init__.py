"""The controls of `routing.experts`, one per file."""
