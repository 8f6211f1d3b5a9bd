"""Where Sluice changes what vLLM 0.32.0 itself does: one patch per file."""
