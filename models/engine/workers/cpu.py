"""Seam: vLLM's `CPUWorker` with our model runner (`--worker-cls`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from sluice.models.engine.runners.v1 import RoutedV1Runner
from sluice.models.engine.workers.base import RoutedWorker


class RoutedCPUModelRunner(RoutedV1Runner, CPUModelRunner):
    """V1 CPU runner that runs step plans."""


class RoutedCPUWorker(RoutedWorker, cpu_worker.CPUWorker):
    """CPU worker that runs step plans."""

    def init_device(self) -> None:
        """Build the device state with our runner class.

        vLLM's CPU worker names its runner class inside `init_device`; for the length of that call
        the name stands for ours. Whether it took is checked by `RoutedWorker`.
        """
        stock: Any = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = RoutedCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock
