"""The engine side of Sluice: policies, step plans, the layer loop and the vLLM seams."""
