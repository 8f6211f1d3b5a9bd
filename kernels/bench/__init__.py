"""Checks and times the operations of `sluice.kernels`: `python -m sluice.kernels.bench`."""
