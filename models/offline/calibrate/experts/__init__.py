"""Calibration steps about experts."""
