"""Patch: AMX is asked for before vLLM's own kernels use it.

Linux gives a process the registers of AMX on request only. oneDNN requests them before its first
AMX instruction, vLLM 0.32.0's kernels do not (`cpu_fused_moe` and others behind `isa="amx"`). A
mixture of experts in bfloat16 then dies while it starts: illegal instruction.
"""

from __future__ import annotations


def install() -> None:
    """Request AMX for this process and its threads; does nothing on a CPU without it."""
    import torch

    torch.cpu._init_amx()
