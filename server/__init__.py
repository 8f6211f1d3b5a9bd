"""The HTTP edge of Sluice: CLI, wire schema, presets, routes and metrics."""
