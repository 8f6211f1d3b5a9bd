"""Seam: `vllm.general_plugins` entry point, run by vLLM in every process."""

from __future__ import annotations


def register() -> None:
    """Install what the engine process needs; stock requests are not affected."""
    from sluice.models.seams import block_hash, busy_wait, prefix_cache, weak_cache, window

    block_hash.install()
    busy_wait.install()
    prefix_cache.install()
    weak_cache.install()
    window.install()
