"""Depth controls: one method a file."""
