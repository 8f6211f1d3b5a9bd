"""Seam: vLLM's GPU `Worker` with our model runner (`--worker-cls`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from sluice.models.engine.runners import attached
from sluice.models.engine.workers.base import RoutedWorker


class RoutedCUDAWorker(RoutedWorker, Worker):
    """CUDA worker that runs step plans."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            from vllm.v1.worker.gpu import model_runner as v2

            return attached(v2.GPUModelRunner, v2=True)(self.vllm_config, self.device)
        from vllm.v1.worker import gpu_model_runner as v1

        return attached(v1.GPUModelRunner, v2=False)(self.vllm_config, self.device)
