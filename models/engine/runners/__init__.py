"""Thin adapters: vLLM's model runners with the routing core in front."""
