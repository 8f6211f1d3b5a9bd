"""Who sends: guidellm, and clients of our own where it has none."""
