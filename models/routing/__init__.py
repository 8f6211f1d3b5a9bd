"""From the `routing` object of a request to its policy, refusals included."""
