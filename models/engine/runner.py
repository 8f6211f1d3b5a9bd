"""Seam: vLLM's V1 model runner, from batch state to forward pass.

`RoutedModelRunner` is mixed in front of a V1 runner class. It learns each request's policy when
vLLM removes or adds request state, plans the step once its inputs are prepared, and either leaves
the forward pass to vLLM or runs the layer loop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sluice.kernels.dispatch import chosen
from sluice.models.engine.batch import Batch
from sluice.models.engine.loop import LayerLoop, ResidualStream
from sluice.models.engine.recorder import count_outcomes
from sluice.models.engine.startup import measured_cost, warm_up_exits, warm_up_routers
from sluice.models.engine.step import RoutedStep, StepOutcome, StepRequests
from sluice.models.experts.batch import BatchExperts
from sluice.models.experts.contrast import BlockIds
from sluice.models.experts.router import ExpertRouter
from sluice.models.policy.axes import DECODE, MODULES, PHASES, IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.telemetry.counter_file import telemetry_folder
from sluice.models.telemetry.expert_counters import SUFFIX, ExpertCounters
from sluice.models.telemetry.layer_counters import LayerCounters
from sluice.models.telemetry.request_record import (
    ExpertRecord,
    ModuleCost,
    RequestRecord,
    RequestRecords,
    by_request,
)
from sluice.models.vllm_adapter.decoder import DecoderStack
from sluice.models.vllm_adapter.families import depth_refusal, family_of
from sluice.models.vllm_adapter.key_values import keep_rows
from sluice.models.vllm_adapter.logits import KnownLogits
from sluice.models.vllm_adapter.patches.contrast_cache import weak_blocks
from sluice.models.vllm_adapter.patching import SeamMovedError
from sluice.models.vllm_adapter.poison import poison_enabled, poison_new_blocks
from sluice.models.vllm_adapter.routers import UnsupportedRouterError, attach, read_routers

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

_HOOKS = ("_update_states", "_on_request_state_removed", "_prepare_inputs", "_model_forward")


class RoutedModelRunner(_Runner):
    """Mixin for V1 model runners; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for hook in _HOOKS:
            if not hasattr(super(), hook):
                raise SeamMovedError(f"`{hook}` on the V1 model runner")
        chosen()  # A name that is none stops the start and not the first request.
        num_layers = self.model_config.get_num_layers(self.parallel_config)
        folder = os.environ.get(PROFILE_ENV)
        self._profile = Profile.load(Path(folder)) if folder else None
        self._batch = Batch(num_layers, self.cache_config.block_size, self._profile, self.device)
        self._step: RoutedStep | None = None
        self._uncommitted: RoutedStep | None = None
        self._weak_blocks: dict[str, BlockIds] = {}
        self._poison = poison_enabled(self.device)
        self._records = RequestRecords(num_layers)
        self._counters = self._open_counters(num_layers)
        self._loop: LayerLoop | None = None
        self._stack: DecoderStack | None = None
        self._known_logits: KnownLogits | None = None
        self._router: ExpertRouter | None = None
        self._expert_shape: ExpertShape | None = None
        self.expert_answer: dict[str, Any] = {"shape": None, "refusal": None}
        self.module_cost: ModuleCost | None = None

    def _counter_file(self, suffix: str) -> Path | None:
        """Only the first rank of an engine counts: the others run the same tokens."""
        folder = telemetry_folder()
        if folder is None or self.parallel_config.rank != 0:
            return None
        return folder / f"engine-{self.parallel_config.data_parallel_index}{suffix}"

    def _open_counters(self, num_layers: int) -> LayerCounters:
        path = self._counter_file(".counts")
        if path is None:
            return LayerCounters.in_memory(num_layers)
        return LayerCounters.create(path, num_layers)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, then find the layers."""
        refused = depth_refusal(self.vllm_config) is not None
        if not refused:
            keep_rows()
        super().load_model(*args, **kwargs)
        if self._profile is not None:  # Not before: a model of the hub is here only now.
            self._profile.check_served(self.model_config)
        if refused:
            return
        family = family_of(self.model_config.architecture)
        assert family is not None
        self._stack = stack = DecoderStack.of(self.get_model(), family)
        # After the stack, which keeps the model's own LM head for the exit tests.
        self._known_logits = KnownLogits(self.get_model())
        config = self.model_config.hf_text_config
        warm_up_exits(self.model_config.get_hidden_size(), self.model_config.dtype, self.device)
        self._batch.plan_layer = measured_cost(self, stack).plan_layer
        self._attach_router(stack)
        self._loop = LayerLoop(stack, self, self._batch.plan_layer, self._router)
        self.module_cost = stack.cost(
            experts_per_token=getattr(config, "num_experts_per_tok", 0) or 0,
            experts=self.model_config.get_num_experts() if family.moe else 0,
        )

    def _attach_router(self, stack: DecoderStack) -> None:
        try:
            shape, specs = read_routers(stack)
        except UnsupportedRouterError as error:
            self.expert_answer = {"shape": None, "refusal": str(error)}
            return
        self._expert_shape = shape
        path = self._counter_file(SUFFIX)
        counters = ExpertCounters.create(path, shape.layers, shape.experts)
        self._router = ExpertRouter(specs, counters, self.device)
        attach(stack, self._router)
        warm_up_routers(specs[0], shape, self.device)
        self._batch.experts = BatchExperts(shape, self._profile, self.device)
        self.expert_answer = {"shape": shape.to_dict(), "refusal": None}

    def _update_states(self, scheduler_output: Any) -> Any:
        # First vLLM's part: it drops ended requests, and an id may end and come back in one step.
        corrections = super()._update_states(scheduler_output)
        self._commit_experts()
        before = self._weak_blocks
        self._weak_blocks = {**before, **weak_blocks(scheduler_output)}
        if self._poison:
            weak = [(own, before.get(name, ())) for name, own in self._weak_blocks.items()]
            poison_new_blocks(self, scheduler_output, weak)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
            if extra is not None and self._stack is not None:
                self._batch.add(
                    request.req_id,
                    extra,
                    request.prompt_token_ids,
                    params.max_tokens or self.model_config.max_model_len,
                    self._stack.embed,
                )
        return corrections

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._batch.remove(req_id)
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
        step = self._batch.step(requests, self._weak_blocks) if len(self._batch) else None
        if self._router is not None:
            self._router.roll()
        if step is None:
            self._counters.add_full_depth(int(scheduled.sum()), requests.generated)
        elif step.stock:
            self._count(step, self._batch.commit(step, _no_residual))
            step = None
        return step

    def _count(self, step: RoutedStep, outcome: StepOutcome) -> None:
        table = self._batch.table
        counts, exits = count_outcomes(outcome.segments, step.passes, table.skip, table.fill)
        self._counters.add(counts.sum(axis=(0, 1)), exits.sum(axis=0))
        for index, state in step.states.items():
            record = self._records.of(state.extra.request_key)
            record.counts += counts[index]
            record.exits += exits[index]
            record.skipped = state.decided_skip
            if index in outcome.exit_layers:
                record.exit_layers.append(outcome.exit_layers[index])

    def _commit_experts(self) -> None:
        """Count what the routers did in the latest step, if that is still to do."""
        step, self._uncommitted = self._uncommitted, None
        if step is None or step.experts is None or self._router is None:
            return
        sums = self._router.sums(step.experts)
        ran = by_request(sums.ran, step.segments, step.passes)
        weak = np.zeros((len(step.requests.ids), len(PHASES)), dtype=np.int64)
        for segment in step.segments:
            if segment.weak:
                weak[step.owner(segment.request), segment.phase] += segment.length
        for index, state in step.states.items():
            policy = state.extra.policy.experts
            if policy.empty:
                continue
            record = self._records.of(state.extra.request_key)
            if record.experts is None:
                record.experts = ExpertRecord(policy.budget is not None)
            record.experts.ran += ran[index]
            record.experts.loaded += sums.loaded
            record.experts.layers += sums.layers
            record.experts.weak += weak[index]

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
        if self._loop is None or model_kwargs:
            raise RuntimeError(f"depth control reached an engine without it ({model_kwargs=})")
        tokens = int(step.requests.scheduled.sum())
        if self._router is not None and step.experts is not None:
            self._router.begin(step.experts)
        try:
            hidden, stream = self._loop.run(
                step,
                positions[:tokens],
                None if input_ids is None else input_ids[:tokens],
                None if inputs_embeds is None else inputs_embeds[:tokens],
            )
        finally:
            if self._router is not None:
                self._router.end()
                self._uncommitted = step
        self._count(step, self._batch.commit(step, stream.hidden))
        self._offer_logits(step, stream)
        return hidden

    def _offer_logits(self, step: RoutedStep, stream: ResidualStream) -> None:
        """Put what exit tests and contrasts made of the logits in the LM head's place."""
        known = [found] if (found := step.known_logits()) is not None else []
        if step.weak is not None:
            assert self._stack is not None
            strong = step.first_rows + step.requests.scheduled - 1
            rows = np.concatenate([strong[step.weak.owners], step.weak.last])
            both = self._stack.logits(stream.hidden(rows))
            known.append((step.weak.owners, step.weak.combined(*both.chunk(2))))
        if known and self._known_logits is not None:
            requests = torch.from_numpy(np.concatenate([own for own, _ in known]))
            logits = torch.cat([own for _, own in known])
            self._known_logits.offer(requests.to(logits.device), logits)

    def take_routing_record(self, record: str) -> dict[str, Any] | None:
        """What an ended request ran: `RequestRecord` as JSON values, with compute fractions."""
        self._commit_experts()
        found = self._records.take(record)
        if found is None:
            return None
        answer: dict[str, Any] = {
            "counts": found.counts.tolist(),
            "exits": found.exits.tolist(),
            **self._fractions(found),
        }
        if found.exit_layers:
            answer["exit_layers"] = found.exit_layers
        if found.experts is not None:
            answer["experts"] = found.experts.to_wire()
        if found.skipped is not None:
            answer["mask"] = {
                module: np.flatnonzero(found.skipped[:, column]).tolist()
                for column, module in enumerate(MODULES)
            }
        return answer

    def _fractions(self, found: RequestRecord) -> dict[str, float]:
        """Shares of full depth's compute, of all tokens and of the generated ones."""
        cost, shape = self.module_cost, self._expert_shape
        counts = (found.counts.sum(axis=0), found.counts[DECODE])
        names = ("compute_fraction", "generated_compute_fraction")
        if cost is None:
            return dict.fromkeys(names, 1.0)
        more = (0.0, 0.0)
        if found.experts is not None and shape is not None:
            more = found.experts.more(cost, shape)
        parts = zip(names, counts, more, strict=True)
        return {name: cost.fraction(own, beyond) for name, own, beyond in parts}


def _no_residual(_tokens: IntArray) -> Any:
    raise RuntimeError("a step without pending rows has no residual stream to hand out")
