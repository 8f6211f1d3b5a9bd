"""Calibration steps about layers, exits and routers over layers."""
