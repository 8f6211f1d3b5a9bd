"""Where Sluice touches vLLM: one file per seam, written against vLLM 0.32.0."""
