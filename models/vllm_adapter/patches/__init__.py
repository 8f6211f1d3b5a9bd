"""Functions of vLLM 0.32.0 that Sluice replaces in every process: one patch per module."""
