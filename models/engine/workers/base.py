"""What our CPU and CUDA workers have in common: the check of the runner, and calls by RPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.models.engine.runners.base import RoutedRunner

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

    def take_routing_record(self, request_key: str) -> dict[str, Any] | None:
        """RPC target: hand out the record of an ended request, `RoutingRecord.to_wire`."""
        assert isinstance(self.model_runner, RoutedRunner)
        record = self.model_runner.take_routing_record(request_key)
        return None if record is None else record.to_wire()
