"""Decode steps over static buffers, so that their layers replay as CUDA graphs; imports no vLLM."""
