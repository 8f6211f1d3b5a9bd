"""What was measured of a model: read, checked and written."""
