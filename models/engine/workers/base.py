"""What our CPU and CUDA workers have in common: the check of the runner, calls by RPC, and counts.

vLLM takes the output of an engine's first rank only, and so that one alone counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.models.engine.runners.base import RoutedRunner
from sluice.models.engine.workers.counted_output import with_counts

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object


class RunnerNotAttachedError(RuntimeError):
    """vLLM built a model runner that is not ours: controls would silently do nothing."""

    def __init__(self, runner: object) -> None:
        import vllm

        super().__init__(
            f"vLLM {vllm.__version__} built {type(runner).__module__}.{type(runner).__name__}, "
            "which Sluice is not attached to."
        )


class RoutedWorker(_Worker):
    """Mixin for vLLM workers; refuses to start on a runner that is not ours."""

    def init_device(self) -> None:
        """Initialise as vLLM does, then check the runner.

        Raises:
            RunnerNotAttachedError: vLLM built a runner that is not ours.
        """
        super().init_device()
        if not isinstance(self.model_runner, RoutedRunner):
            raise RunnerNotAttachedError(self.model_runner)

    def compile_or_warm_up_model(self) -> Any:
        """Compile and warm up as vLLM does: with requests of its own, on some runners."""
        assert isinstance(self.model_runner, RoutedRunner)
        with self.model_runner.core.warming_up():
            return super().compile_or_warm_up_model()

    def describe_experts(self) -> dict[str, Any]:
        """RPC target: `shape` (`ExpertShape.to_dict`) of the routed experts, or why there is none.

        `refusal` is None where expert controls can run, and with a model that depth controls do
        not run on either.
        """
        assert isinstance(self.model_runner, RoutedRunner)
        return self.model_runner.expert_answer

    def describe_cost(self) -> dict[str, Any] | None:
        """RPC target: `ModuleCost.to_wire` of the model; None where nothing is routed."""
        assert isinstance(self.model_runner, RoutedRunner)
        return self.model_runner.core.cost_answer

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step as vLLM does, and tell the scheduler what ran."""
        output = super().execute_model(scheduler_output)
        return self._with_counts(output, idle=not scheduler_output.total_num_scheduled_tokens)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as vLLM does, and tell the scheduler what ran."""
        return self._with_counts(super().sample_tokens(grammar_output), idle=False)

    def _with_counts(self, output: Any, *, idle: bool) -> Any:
        assert isinstance(self.model_runner, RoutedRunner)
        # vLLM's runner says None where `sample_tokens` comes next.
        counts = None if output is None else self.model_runner.core.take_counts(idle=idle)
        return output if counts is None else with_counts(output, counts.read)
