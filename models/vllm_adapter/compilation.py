"""Seam: how vLLM compiles a model, for what we compile of it ourselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sluice.models.vllm_adapter.decoder import DecoderStack
from sluice.models.vllm_adapter.patching import SeamMovedError
from sluice.models.vllm_adapter.routers import moe_runners

_ENTRY = "_forward_entry"


def inductor_options(vllm_config: Any) -> dict[str, Any] | None:
    """Inductor's options of an engine that compiles its model on a CPU, or None.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    from vllm.config import CompilationMode

    config = vllm_config.compilation_config
    if vllm_config.device_config.device_type != "cpu" or config.backend != "inductor":
        return None
    if config.mode in (None, CompilationMode.NONE):
        return None
    # vLLM's wrapper adds what is an option of Dynamo.
    return {k: v for k, v in config.inductor_compile_config.items() if k != "guard_filter_fn"}


@contextmanager
def experts_as_operations(stack: DecoderStack) -> Iterator[None]:
    """Trace a mixture of experts as one operation, as vLLM does on CUDA.

    On a CPU vLLM traces through it, and the router of that moment would become part of the graph.
    The operation finds its layer by name when it runs, and so our router is asked.

    Raises:
        SeamMovedError: vLLM's runners of experts have no entry to replace.
    """
    runners = list(moe_runners(stack).values())
    if not all(hasattr(runner, _ENTRY) for runner in runners):
        raise SeamMovedError(f"`{_ENTRY}` on MoERunner")
    entries = [getattr(runner, _ENTRY) for runner in runners]
    for runner in runners:
        shared = runner.shared_experts is not None
        operation = torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward
        setattr(runner, _ENTRY, operation)
    try:
        yield
    finally:
        for runner, entry in zip(runners, entries, strict=True):
            setattr(runner, _ENTRY, entry)
