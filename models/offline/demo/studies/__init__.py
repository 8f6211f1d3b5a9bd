"""What was found out about the demo model's experts."""
