"""Speed against stock vLLM: the same flags, model and prompts, interleaved in one run."""
