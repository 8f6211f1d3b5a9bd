"""Who sent a request, and what its sender may ask for."""
