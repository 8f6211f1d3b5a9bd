"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process that it starts."""

from __future__ import annotations

from types import ModuleType


def register() -> None:
    """Install what the engine process needs; stock requests are not affected."""
    for patch in patches():
        patch.install()


def patches() -> tuple[ModuleType, ...]:
    """The modules of the patches, imported when they are asked for: they import vLLM."""
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

    return (
        amx,
        api_telemetry,
        busy_wait,
        contrast_cache,
        engine_telemetry,
        inductor_cache,
        prefix_cache,
        sliding_window,
    )
