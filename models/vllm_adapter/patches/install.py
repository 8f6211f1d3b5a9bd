"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process that it starts."""

from __future__ import annotations


def register() -> None:
    """Install what the engine process needs; stock requests are not affected."""
    from sluice.models.vllm_adapter.patches import (
        amx,
        api_telemetry,
        busy_wait,
        contrast_cache,
        engine_telemetry,
        inductor_cache,
        prefix_cache,
        sliding_window,
    )

    patches = (
        amx,
        api_telemetry,
        busy_wait,
        contrast_cache,
        engine_telemetry,
        inductor_cache,
        prefix_cache,
        sliding_window,
    )
    for patch in patches:
        patch.install()
