"""Methods that decide which layers a prompt or a token skips."""
