"""The tasks that the demo model is trained and judged on."""
