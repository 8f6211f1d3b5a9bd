"""The HTTP edge: what happens between a request's bytes and vLLM, and on the way back."""
