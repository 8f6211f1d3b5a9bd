"""Where Sluice touches vLLM: one file per seam, written against vLLM 0.32.0."""

CPU_WORKER = "sluice.models.seams.cpu_worker.RoutedCPUWorker"
CUDA_WORKER = "sluice.models.seams.cuda_worker.RoutedCUDAWorker"
"""Values for vLLM's `worker_cls`: names, so that naming a worker imports nothing."""
