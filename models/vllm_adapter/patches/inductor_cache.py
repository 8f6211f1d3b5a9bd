"""Patch: Inductor's cache tells CPUs with wider and narrower vectors apart.

The key of torch 2.13's FX cache does not have the vectors of the CPU, and what is found there is
built for those of the CPU at hand: code that was made for wider ones leaves out half of the
numbers. That is so after `ATEN_CPU_CAPABILITY` has changed, and where a cache moves between
machines. What vLLM compiles even in an eager engine, the embedding under tensor parallelism, then
reads past its table. As an option of Inductor the width is part of the key.
"""

from __future__ import annotations

import platform

_BITS = {"AVX512": 512, "AVX2": 256, "DEFAULT": 0}


def install() -> None:
    """Set the width that Inductor would take anyway, unless somebody has set one."""
    import torch
    from torch._inductor import config

    if config.cpp.simdlen is None:
        config.cpp.simdlen = vector_bits(torch.backends.cpu.get_cpu_capability())


def vector_bits(capability: str) -> int | None:
    """Bits of the widest vectors; None, which is Inductor's own choice, where PyTorch does not say.

    Args:
        capability: of the CPU, by PyTorch's name.
    """
    return _BITS.get(capability) if platform.machine() in ("x86_64", "AMD64") else None
