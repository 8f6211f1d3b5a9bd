"""Speed against stock vLLM, interleaved in one run."""
