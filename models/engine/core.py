"""What routes an engine's requests, whatever model runner vLLM runs them on.

The adapter of a runner (`sluice.models.engine.runners`) tells the core which requests begin and
end, and what a step schedules. The core plans the step. Then vLLM's own forward pass serves it, or
the core runs it over the model's layers, with the buffers that the adapter hands over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.kernels.dispatch import chosen
from sluice.models.engine.attention import BatchBuffers
from sluice.models.engine.loop import captured_by
from sluice.models.engine.recorder import Recorder, SentCounts
from sluice.models.engine.residual_stream import ResidualStream
from sluice.models.engine.startup import RoutedModel
from sluice.models.engine.step import RoutedStep, StepRequests
from sluice.models.experts.contrast import BlockIds
from sluice.models.policy.axes import IntArray
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.vllm_adapter.families import depth_refusal
from sluice.models.vllm_adapter.key_values import keep_rows
from sluice.models.vllm_adapter.patches.contrast_cache import weak_blocks
from sluice.models.vllm_adapter.poison import poison_enabled, poison_new_blocks


class RoutingCore:
    """Routes the requests of one engine; one instance per model runner.

    Attributes:
        routed: the loaded model and what routes its requests. None before it is loaded, and where
            the engine cannot run depth controls: then vLLM runs every step.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        """Read what the environment says.

        Args:
            vllm_config: vLLM's `VllmConfig`.
            device: of the model.

        Raises:
            ProfileError: the profile cannot be read.
            RuntimeError: poison is asked for, and the device is not a CPU.
            ValueError: an implementation of the operations is chosen that does not exist.
        """
        chosen()  # A wrong name stops the start, and not the first request.
        folder = os.environ.get(PROFILE_ENV)
        self._profile = Profile.load(Path(folder)) if folder else None
        self._poison = poison_enabled(device)
        self._config = vllm_config
        self._device = device
        self._refused = depth_refusal(vllm_config) is not None
        self._counts = _output_rank(vllm_config.parallel_config)
        self._recorder = Recorder()
        self._weak_blocks: dict[str, BlockIds] = {}
        self._warming_up = False
        self.routed: RoutedModel | None = None

    def prepare_load(self) -> None:
        """Called before vLLM loads the model."""
        if not self._refused:
            keep_rows()

    def load(self, model: nn.Module) -> None:
        """Build what routes requests around the model that vLLM has loaded.

        Raises:
            ProfileError: the profile was made for another model.
            SeamMovedError: the model's parts are not where they are looked for.
        """
        config = self._config.model_config
        if self._profile is not None:  # Not before: a model of the hub is here only now.
            self._profile.check_served(config)
        if not self._refused:
            self.routed = RoutedModel.build(model, self._config, self._device, self._profile)
            self._recorder = self.routed.recorder

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Steps within are vLLM's own, of requests that nobody sent: they are not counted."""
        self._warming_up = True
        try:
            yield
        finally:
            self._warming_up = False

    def begin_step(self, scheduler_output: Any, kv_caches: Sequence[torch.Tensor]) -> None:
        """Begin a step, after requests that ended are removed and before new ones are added.

        Args:
            scheduler_output: vLLM's, of the step.
            kv_caches: the runner's, one per layer.
        """
        before = self._weak_blocks
        self._weak_blocks = {**before, **weak_blocks(scheduler_output)}
        if self._poison:
            weak = [(now, before.get(name, ())) for name, now in self._weak_blocks.items()]
            poison_new_blocks(
                kv_caches,
                scheduler_output,
                weak,
                block_size=self._config.cache_config.block_size,
                latent=self._config.model_config.use_mla,
            )

    def resume(self, request_id: str, generated: int) -> bool:
        """Go on with a request that was preempted; what was decided for it still holds.

        Args:
            request_id: vLLM's.
            generated: tokens of its answer that vLLM has.

        Returns:
            Whether it has a policy.
        """
        return self.routed is not None and self.routed.batch.resume(request_id, generated)

    def add(self, request: Any) -> None:
        """Add a request that is about to start.

        Args:
            request: vLLM's `NewRequestData`.
        """
        params = request.sampling_params
        extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
        if extra is None or self.routed is None:
            return
        self.routed.batch.add(
            request.req_id,
            extra,
            request.prompt_token_ids,
            params.max_tokens or self._config.model_config.max_model_len,
            self.routed.stack.embed,
        )

    def remove(self, request_id: str) -> None:
        """Forget an ended request."""
        if self.routed is not None:
            self.routed.batch.remove(request_id)
        self._recorder.forget(request_id)
        self._weak_blocks.pop(request_id, None)

    def plan(self, requests: StepRequests) -> RoutedStep | None:
        """Plan a step. None: vLLM's own forward pass serves it, and it is noted already."""
        if self._warming_up:
            return None
        routed, step = self.routed, None
        if routed is not None and len(routed.batch):
            step = routed.batch.step(requests, self._weak_blocks)
        if routed is None or step is None:
            if self._counts:
                self._recorder.note_stock(requests)
        elif step.stock:
            self._note(routed, step, _no_residual)
            step = None
        return step

    def run(
        self,
        step: RoutedStep,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        buffers: BatchBuffers,
    ) -> torch.Tensor:
        """Run a planned step, in vLLM's forward context of it.

        Args:
            step: from `plan`.
            positions: (tokens or more,), int64.
            input_ids: (tokens or more,), or None if `inputs_embeds` is given.
            inputs_embeds: (tokens or more, hidden), or None.
            buffers: of its batch.

        Returns:
            Hidden states after the final norm, (tokens, hidden).
        """
        routed = self.routed
        assert routed is not None
        tokens = int(step.requests.scheduled.sum())
        if routed.router is not None and step.experts is not None:
            routed.router.begin(step.experts)
        try:
            hidden, stream = routed.loop.run(
                step,
                positions[:tokens],
                None if input_ids is None else input_ids[:tokens],
                None if inputs_embeds is None else inputs_embeds[:tokens],
                buffers,
            )
        finally:
            if routed.router is not None:
                routed.router.end()
        self._note(routed, step, stream.hidden, routed_experts=step.experts is not None)
        _offer_logits(routed, step, stream)
        return hidden

    def captures(self, step: RoutedStep, rows: int) -> bool:
        """Whether `run_captured` can run a step with so many rows, padding included."""
        captured = None if self.routed is None else self.routed.loop.captured
        return captured is not None and rows in captured and captured_by(step)

    def run_captured(
        self, step: RoutedStep, positions: torch.Tensor, input_ids: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Run a planned step on static buffers.

        Args:
            step: from `plan`; `captures` it.
            positions: (tokens or more,), int64.
            input_ids: (tokens or more,).
            rows: to run with, padding included.

        Returns:
            Hidden states after the final norm, (tokens, hidden); the next step overwrites them.
        """
        assert self.routed is not None
        tokens = len(step.requests.ids)
        hidden, stream = self.routed.loop.run_captured(
            step, positions[:tokens], input_ids[:tokens], rows
        )
        self._note(self.routed, step, stream.hidden)
        _offer_logits(self.routed, step, stream)
        return hidden

    @property
    def expert_answer(self) -> dict[str, Any]:
        """Answer of `RoutedWorker.describe_experts`."""
        if self.routed is None:
            return {"shape": None, "refusal": None}
        shape = self.routed.expert_shape
        return {"shape": shape and shape.to_dict(), "refusal": self.routed.expert_refusal}

    @property
    def cost_answer(self) -> dict[str, Any] | None:
        """Answer of `RoutedWorker.describe_cost`."""
        return None if self.routed is None else self.routed.cost.to_wire()

    def take_counts(self, *, idle: bool) -> SentCounts | None:
        """What steps ran since the last call; None for nothing, and on ranks that do not count.

        Args:
            idle: the engine has nothing to run, and may have nothing for long.
        """
        if self._warming_up or not self._counts:
            return None
        return self._recorder.take(idle=idle)

    def _note(
        self,
        routed: RoutedModel,
        step: RoutedStep,
        residual: Callable[[IntArray], torch.Tensor],
        *,
        routed_experts: bool = False,
    ) -> None:
        """Store what a step decided, and note what it ran."""
        outcome = routed.batch.commit(step, residual)
        if self._counts:
            self._recorder.note(step, outcome, routed_experts=routed_experts)


def _offer_logits(routed: RoutedModel, step: RoutedStep, stream: ResidualStream) -> None:
    """Put what exit tests and contrasts made of the logits in the LM head's place."""
    known = [logits] if (logits := step.known_logits()) is not None else []
    if step.weak is not None:
        strong = step.first_rows + step.requests.scheduled - 1
        rows = np.concatenate([strong[step.weak.owners], step.weak.last])
        both = routed.stack.logits(stream.hidden(rows))
        known.append((step.weak.owners, step.weak.combined(*both.chunk(2))))
    if known:
        requests = torch.from_numpy(np.concatenate([indices for indices, _ in known]))
        rows_logits = torch.cat([logits for _, logits in known])
        routed.known_logits.offer(requests.to(rows_logits.device), rows_logits)


def _output_rank(parallel_config: Any) -> bool:
    """Whether this is the rank whose outputs vLLM takes; the others run the same tokens."""
    last_stage = (
        parallel_config.tensor_parallel_size * parallel_config.prefill_context_parallel_size
    )
    first: int = parallel_config.world_size - last_stage
    return bool(parallel_config.rank == first)


def _no_residual(_tokens: IntArray) -> Any:
    raise RuntimeError("a step without pending rows has no residual stream to hand out")
