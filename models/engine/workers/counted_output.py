"""Outputs of a worker that carry what its steps ran."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from sluice.models.telemetry.step_counts import WorkerCounts
from sluice.models.vllm_adapter.patches.engine_telemetry import COUNTS_ATTRIBUTE

ReadCounts = Callable[[], WorkerCounts]


class CountedOutput(AsyncModelRunnerOutput):
    """Waits for an output and for its counts, in the thread where vLLM waits."""

    def __init__(self, output: AsyncModelRunnerOutput, read: ReadCounts) -> None:
        self._output = output
        self._read = read

    def get_output(self) -> Any:
        """The output, with its counts."""
        return with_counts(self._output.get_output(), self._read)


def with_counts(output: Any, read: ReadCounts) -> Any:
    """An output that carries what the steps before it ran.

    Args:
        output: vLLM's `ModelRunnerOutput` or `AsyncModelRunnerOutput`.
        read: waits for what ran.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return CountedOutput(output, read)
    # Every step without tokens shares this one.
    output = copy.copy(output) if output is EMPTY_MODEL_RUNNER_OUTPUT else output
    setattr(output, COUNTS_ATTRIBUTE, read())
    return output
