"""Which experts serve a token: one control or method a file."""
