"""Seam: `vllm.general_plugins` entry point, run by vLLM in every process."""

from __future__ import annotations


def register() -> None:
    """Install what the engine process needs; stock requests are not affected."""
    from sluice.models.vllm_adapter.patches import busy_wait
    from sluice.models.vllm_adapter.patches import contrast_cache as weak_cache
    from sluice.models.vllm_adapter.patches import prefix_cache as block_hash
    from sluice.models.vllm_adapter.patches import sliding_window as window

    block_hash.install()
    busy_wait.install()
    weak_cache.install()
    window.install()
