"""A worker whose runner is vLLM's own, as it would be if vLLM built it in another place."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from sluice.models.engine.workers.base import RoutedWorker


class UnattachedWorker(RoutedWorker, CPUWorker):
    """Never swaps the runner class."""
