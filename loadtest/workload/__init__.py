"""What to send and when: scenarios, prompts, arrivals and the schedule they make."""
