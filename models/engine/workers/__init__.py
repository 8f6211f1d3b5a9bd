"""Where Sluice touches vLLM: one file per seam, written against vLLM 0.32.0."""

from __future__ import annotations

CPU_WORKER = "sluice.models.engine.workers.cpu.RoutedCPUWorker"
CUDA_WORKER = "sluice.models.engine.workers.cuda.RoutedCUDAWorker"
"""Values for vLLM's `worker_cls`: names, so that naming a worker imports nothing."""


def worker_class() -> str:
    """Our worker for the platform vLLM runs on.

    Raises:
        SystemExit: neither CPU nor CUDA.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU_WORKER
    if current_platform.is_cuda():
        return CUDA_WORKER
    raise SystemExit(f"sluice serve runs on CPU and CUDA, not on {current_platform.device_name}")
