"""Our vLLM workers and scheduler by name; naming one imports nothing of vLLM."""

from __future__ import annotations

CPU_WORKER = "sluice.models.engine.workers.cpu.RoutedCPUWorker"
CUDA_WORKER = "sluice.models.engine.workers.cuda.RoutedCUDAWorker"
"""Values for vLLM's `worker_cls`."""

GROUPING_SCHEDULER = "sluice.models.engine.scheduler.grouping_scheduler"
"""Value for vLLM's `scheduler_cls`."""

GROUP_BY_DEPTH_ENV = "SLUICE_GROUP_BY_DEPTH"
"""Seconds for which a waiting request may be overtaken by others of the depth that runs."""

CPU_KV_CACHE_BYTES = 1024**3
"""K/V cache of an engine on a CPU, unless the user says how much.

vLLM would take most of the machine's memory, and not start where another process has it.
"""


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
    raise SystemExit(f"Sluice runs on CPU and CUDA, not on {current_platform.device_name}")
