"""Seam: vLLM's V1 model runner, from batch state to forward pass.

`RoutedModelRunner` is mixed in front of a V1 runner class. It learns each request's policy when
vLLM removes or adds request state, plans the step once its inputs are prepared, and either leaves
the forward pass to vLLM or runs the layer loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.models.families import family_of
from sluice.models.loop import LayerLoop
from sluice.models.plan import StepPlan, StepRequests, build_plan
from sluice.models.policy import PolicyTicket
from sluice.models.policy_table import STOCK_ROW, PolicyTable
from sluice.models.stack import DecoderStack, SeamMovedError
from sluice.models.support import depth_refusal
from sluice.models.telemetry import (
    LayerCounters,
    ModuleCost,
    RequestRecords,
    full_depth_counts,
    telemetry_folder,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

_HOOKS = ("_update_states", "_on_request_state_removed", "_prepare_inputs", "_model_forward")
_MAX_CACHED_PLANS = 16


@dataclass(frozen=True, slots=True)
class _Routed:
    """A live request that has a ticket."""

    row: int
    record: str


class RoutedModelRunner(_Runner):
    """Mixin for V1 model runners; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for hook in _HOOKS:
            if not hasattr(super(), hook):
                raise SeamMovedError(f"`{hook}` on the V1 model runner")
        num_layers = self.model_config.get_num_layers(self.parallel_config)
        self._routed: dict[str, _Routed] = {}
        self._table = PolicyTable(num_layers)
        self._plans: dict[bytes, StepPlan] = {}
        self._plan: StepPlan | None = None
        self._full_depth = full_depth_counts(num_layers)
        self._records = RequestRecords(num_layers)
        self._counters = self._open_counters(num_layers)
        self._loop: LayerLoop | None = None
        self.module_cost: ModuleCost | None = None

    def _open_counters(self, num_layers: int) -> LayerCounters:
        """Only the first rank of an engine counts: the others run the same tokens."""
        folder = telemetry_folder()
        if folder is None or self.parallel_config.rank != 0:
            return LayerCounters.in_memory(num_layers)
        engine = self.parallel_config.data_parallel_index
        return LayerCounters.create(folder / f"engine-{engine}.counts", num_layers)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, then find the layers."""
        super().load_model(*args, **kwargs)
        if depth_refusal(self.vllm_config) is not None:
            return
        family = family_of(self.model_config.architecture)
        assert family is not None
        stack = DecoderStack.of(self.get_model(), family)
        config = self.model_config.hf_text_config
        self._loop = LayerLoop(stack, self)
        self.module_cost = stack.cost(
            experts_per_token=getattr(config, "num_experts_per_tok", 0) or 0,
            experts=self.model_config.get_num_experts() if family.moe else 0,
        )

    def _update_states(self, scheduler_output: Any) -> Any:
        # First vLLM's part: it drops ended requests, and an id may end and come back in one step.
        corrections = super()._update_states(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            ticket = params and PolicyTicket.from_extra_args(params.extra_args)
            if ticket is not None:
                row = self._table.acquire(ticket.policy)
                self._routed[request.req_id] = _Routed(row, ticket.record)
        return corrections

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        routed = self._routed.pop(req_id, None)
        if routed is not None and self._table.release(routed.row):
            # The row may come back with another policy, and plans are keyed by row.
            self._plans.clear()

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._plan = self._plan_step(num_scheduled_tokens)
        return prepared

    def _plan_step(self, scheduled: Any) -> StepPlan | None:
        """Plan and count the step; None leaves it to vLLM."""
        if not self._routed:
            self._counters.add(self._full_depth * int(scheduled.sum()))
            return None
        batch = self.input_batch
        n = batch.num_reqs
        routed = [self._routed.get(req_id) for req_id in batch.req_ids[:n]]
        requests = StepRequests.of(
            rows=np.array([r.row if r else STOCK_ROW for r in routed], dtype=np.int64),
            scheduled=scheduled.astype(np.int64),
            computed=batch.num_computed_tokens_cpu[:n].astype(np.int64),
            prompt=batch.num_prompt_tokens[:n].astype(np.int64),
        )
        plan = self._plans.get(requests.key)
        if plan is None:
            if len(self._plans) >= _MAX_CACHED_PLANS:
                self._plans.clear()
            plan = self._plans[requests.key] = build_plan(requests, self._table.masks)
        self._counters.add(plan.counts)
        for index, request in enumerate(routed):
            if request is not None:
                self._records.add(request.record, plan.request_counts[index])
        return None if plan.full_depth else plan

    def _model_forward(
        self,
        input_ids: Any = None,
        positions: Any = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        plan, self._plan = self._plan, None
        if plan is None:
            return super()._model_forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs
            )
        if self._loop is None or model_kwargs:
            raise RuntimeError(f"depth control reached an engine without it ({model_kwargs=})")
        tokens = int(plan.counts[0, 0].sum())
        return self._loop.run(
            plan,
            positions[:tokens],
            None if input_ids is None else input_ids[:tokens],
            None if inputs_embeds is None else inputs_embeds[:tokens],
        )

    def take_routing_record(self, record: str) -> dict[str, Any] | None:
        """Counts and compute fraction of an ended request; see `RequestRecords.take`."""
        counts = self._records.take(record)
        if counts is None:
            return None
        fraction = self.module_cost.fraction(counts) if self.module_cost is not None else 1.0
        return {"counts": counts.tolist(), "compute_fraction": fraction}
