"""Seam: vLLM's `CPUWorker` with our model runner (`--worker-cls`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker

from sluice.models.engine.runners import attached
from sluice.models.engine.workers.base import RoutedWorker


class RoutedCPUWorker(RoutedWorker, cpu_worker.CPUWorker):
    """CPU worker that runs step plans."""

    def init_device(self) -> None:
        """Build the device state with our runner class.

        vLLM's CPU worker names its runner class inside `init_device`; for the length of that call
        the name stands for ours. Whether it took is checked by `RoutedWorker`.
        """
        module = _runner_module(v2=self.use_v2_model_runner)
        stock = module.CPUModelRunner
        module.CPUModelRunner = attached(stock, v2=self.use_v2_model_runner)
        try:
            super().init_device()
        finally:
            module.CPUModelRunner = stock


def _runner_module(*, v2: bool) -> Any:
    """Where vLLM's CPU worker looks its runner class up."""
    if not v2:
        return cpu_worker
    from vllm.v1.worker.cpu import model_runner

    return model_runner
