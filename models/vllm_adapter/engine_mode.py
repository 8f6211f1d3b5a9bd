"""How an engine runs its model, from vLLM's configuration. No torch: the API server asks."""

from __future__ import annotations

from typing import Any

from sluice.models.profile.frontier_fields import EngineMode


def engine_mode(vllm_config: Any) -> EngineMode:
    """How an engine runs its model: compiled (or captured in CUDA graphs), or eager.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    config = vllm_config.compilation_config
    compiles = config.mode not in (None, CompilationMode.NONE)
    captures = config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return "compiled" if compiles or captures else "eager"
