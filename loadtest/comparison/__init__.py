"""Decode speed of policies over HTTP, against stock vLLM on the same machine at the same time."""
