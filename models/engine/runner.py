"""Seam: vLLM's V1 model runner (`GPUModelRunner`, `CPUModelRunner`), from batch to forward pass.

`RoutedModelRunner` is mixed in front of a V1 runner class. It learns each request's policy when
vLLM removes or adds request state (`_update_states`, `_on_request_state_removed`), and plans the
step once its inputs are prepared (`_prepare_inputs`). Then it either leaves the forward pass to
vLLM or runs the layer loop (`_model_forward`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sluice.kernels.dispatch import chosen
from sluice.models.engine.loop import ResidualStream
from sluice.models.engine.startup import RoutedModel, counter_path
from sluice.models.engine.step import RoutedStep, StepRequests
from sluice.models.experts.contrast import BlockIds
from sluice.models.policy.axes import IntArray
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.telemetry.layer_counters import SUFFIX, LayerCounters
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.models.vllm_adapter.families import depth_refusal
from sluice.models.vllm_adapter.key_values import keep_rows
from sluice.models.vllm_adapter.patches.contrast_cache import weak_blocks
from sluice.models.vllm_adapter.patching import SeamMovedError
from sluice.models.vllm_adapter.poison import poison_enabled, poison_new_blocks

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

_HOOKS = ("_update_states", "_on_request_state_removed", "_prepare_inputs", "_model_forward")


class RoutedModelRunner(_Runner):
    """Mixin for V1 model runners; see the module."""

    routed: RoutedModel | None
    """None where the engine cannot run depth controls: then vLLM runs every step."""
    _counters: LayerCounters

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for hook in _HOOKS:
            if not hasattr(super(), hook):
                raise SeamMovedError(f"`{hook}` on the V1 model runner")
        chosen()  # A wrong name stops the start, and not the first request.
        folder = os.environ.get(PROFILE_ENV)
        self._profile = Profile.load(Path(folder)) if folder else None
        self._poison = poison_enabled(self.device)
        self._step: RoutedStep | None = None
        self._weak_blocks: dict[str, BlockIds] = {}

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, then build what routes requests."""
        refused = depth_refusal(self.vllm_config) is not None
        if not refused:
            keep_rows()
        super().load_model(*args, **kwargs)
        if self._profile is not None:  # Not before: a model of the hub is here only now.
            self._profile.check_served(self.model_config)
        num_layers = self.model_config.get_num_layers(self.parallel_config)
        path = counter_path(self.parallel_config, SUFFIX)
        self._counters = LayerCounters.create(path, num_layers)
        self.routed = None if refused else RoutedModel.build(self, self._profile, self._counters)

    def _update_states(self, scheduler_output: Any) -> Any:
        # First vLLM's part: it drops ended requests, and an id may end and come back in one step.
        corrections = super()._update_states(scheduler_output)
        if self.routed is not None:
            self.routed.recorder.count_experts()
        before = self._weak_blocks
        self._weak_blocks = {**before, **weak_blocks(scheduler_output)}
        if self._poison:
            weak = [(now, before.get(name, ())) for name, now in self._weak_blocks.items()]
            poison_new_blocks(self, scheduler_output, weak)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
            if extra is not None and self.routed is not None:
                self.routed.batch.add(
                    request.req_id,
                    extra,
                    request.prompt_token_ids,
                    params.max_tokens or self.model_config.max_model_len,
                    self.routed.stack.embed,
                )
        return corrections

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        if self.routed is not None:
            self.routed.batch.remove(req_id)
        self._weak_blocks.pop(req_id, None)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._step = self._plan_step(num_scheduled_tokens)
        return prepared

    def _plan_step(self, scheduled: Any) -> RoutedStep | None:
        """Plan the step; a stock one is counted and None."""
        batch = self.input_batch
        n = batch.num_reqs
        requests = StepRequests(
            ids=batch.req_ids[:n],
            scheduled=scheduled.astype(np.int64),
            computed=batch.num_computed_tokens_cpu[:n].astype(np.int64),
            prompt=batch.num_prompt_tokens[:n].astype(np.int64),
        )
        routed, step = self.routed, None
        if routed is not None:
            if len(routed.batch):
                step = routed.batch.step(requests, self._weak_blocks)
            if routed.router is not None:
                routed.router.roll()
        if routed is None or step is None:
            self._counters.add_full_depth(int(scheduled.sum()), requests.generated)
        elif step.stock:
            routed.recorder.count(step, routed.batch.commit(step, _no_residual))
            step = None
        return step

    def _model_forward(
        self,
        input_ids: Any = None,
        positions: Any = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        step, self._step = self._step, None
        if step is None:
            return super()._model_forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs
            )
        routed = self.routed
        if routed is None or model_kwargs:
            raise RuntimeError(f"depth control reached an engine without it ({model_kwargs=})")
        tokens = int(step.requests.scheduled.sum())
        if routed.router is not None and step.experts is not None:
            routed.router.begin(step.experts)
        try:
            hidden, stream = routed.loop.run(
                step,
                positions[:tokens],
                None if input_ids is None else input_ids[:tokens],
                None if inputs_embeds is None else inputs_embeds[:tokens],
            )
        finally:
            if routed.router is not None:
                routed.router.end()
                routed.recorder.count_experts_later(step)
        routed.recorder.count(step, routed.batch.commit(step, stream.hidden))
        _offer_logits(routed, step, stream)
        return hidden

    @property
    def expert_answer(self) -> dict[str, Any]:
        """Answer of `RoutedWorker.describe_experts`."""
        if self.routed is None:
            return {"shape": None, "refusal": None}
        shape = self.routed.expert_shape
        return {"shape": shape and shape.to_dict(), "refusal": self.routed.expert_refusal}

    def take_routing_record(self, request_key: str) -> RoutingRecord | None:
        """What an ended request ran; None if it never reached a step, or after the first call."""
        return None if self.routed is None else self.routed.recorder.take(request_key)


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


def _no_residual(_tokens: IntArray) -> Any:
    raise RuntimeError("a step without pending rows has no residual stream to hand out")
