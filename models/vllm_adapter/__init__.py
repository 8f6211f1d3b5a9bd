"""Where Sluice touches vLLM 0.32.0's models: one seam per file."""
