"""What only a GPU can show of decode steps on static buffers, without vLLM."""
