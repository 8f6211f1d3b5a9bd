"""Seam: vLLM's GPU `Worker` with our model runner (`--worker-cls`), V1 runner only."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from sluice.models.engine.runners.v1 import RoutedV1Runner
from sluice.models.engine.workers.base import RoutedWorker


class RoutedCUDAModelRunner(RoutedV1Runner, GPUModelRunner):
    """V1 CUDA runner that runs step plans."""


class RoutedCUDAWorker(RoutedWorker, Worker):
    """CUDA worker that runs step plans."""

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            return super()._make_model_runner()
        return RoutedCUDAModelRunner(self.vllm_config, self.device)
