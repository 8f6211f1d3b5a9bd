"""Seam: vLLM's V2 model runner (`v1/worker/gpu/model_runner.py`), from batch to forward pass.

`RoutedV2Runner` is mixed in front of a V2 runner class. The core learns of requests where vLLM
drops and adds them (`finish_requests`, `add_requests`), and plans the step once vLLM knows its
batch (`gather_batch_req_state`): before it chooses a CUDA graph (`v2_graphs`).
The runner calls the model itself, so an instance attribute stands before the model's `forward`.

This runner drops a preempted request and takes it as a new one later, with its generated tokens
as a part of what is to prefill. The core keeps such a request in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sluice.models.engine.attention import BatchBuffers, CacheGroup
from sluice.models.engine.row_builders import RowBuilders
from sluice.models.engine.runners.base import RoutedRunner
from sluice.models.engine.runners.seams import BOTH, TELEMETRY, V2
from sluice.models.engine.runners.v2_graphs import StepGraphs
from sluice.models.engine.step import RoutedStep, StepRequests


class RoutedV2Runner(RoutedRunner):
    """Mixin for V2 model runners; see the module.

    Attributes:
        planned_step: the core's step that is about to run; None is vLLM's.
    """

    seams = (*BOTH, *TELEMETRY, *V2)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preempted: set[str] = set()
        self.planned_step: RoutedStep | None = None
        self._buffers: BatchBuffers | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, build what routes requests, and stand before the model's forward."""
        super().load_model(*args, **kwargs)
        if self.routed is not None:
            self.model.forward = self._before(self.model.forward)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, with our choice of what runs in a CUDA graph."""
        super().initialize_kv_cache(*args, **kwargs)
        self._builders = RowBuilders(
            self.attn_groups, self.kernel_block_sizes, self.vllm_config, self.device
        )
        if self.routed is not None:
            self._graphs = StepGraphs(self)

    def capture_model(self, *, profile_only: bool = False) -> int:
        """As vLLM does, and then for decode steps of the core."""
        size: int = super().capture_model(profile_only=profile_only)
        if self.routed is not None and not profile_only:
            with torch.inference_mode():
                self._graphs.capture()
        return size

    def finish_requests(self, scheduler_output: Any) -> None:
        """Drop requests that ended or are preempted."""
        super().finish_requests(scheduler_output)
        ended = scheduler_output.finished_req_ids
        self._preempted |= scheduler_output.preempted_req_ids or set()
        self._preempted -= ended
        for request_id in ended:
            self.core.remove(request_id)
        self.core.begin_step(scheduler_output, self.kv_caches)

    def add_requests(self, scheduler_output: Any) -> None:
        """Add requests that start, or start again."""
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            returns = request.req_id in self._preempted
            self._preempted.discard(request.req_id)
            generated = len(request.prefill_token_ids) - request.prompt_len
            if not (returns and self.core.resume(request.req_id, generated)):
                self.core.add(request)

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> Any:
        """Order the batch, and plan its step."""
        gathered = super().gather_batch_req_state(scheduler_output, dummy_run)
        self.planned_step = None
        if not dummy_run:
            batch, states = gathered[0], self.req_states
            requests = StepRequests(
                ids=batch.req_ids,
                scheduled=batch.num_scheduled_tokens.astype(np.int64),
                computed=states.num_computed_tokens_np[batch.idx_mapping_np].astype(np.int64),
                prompt=states.prompt_len.np[batch.idx_mapping_np].astype(np.int64),
            )
            self.planned_step = self.core.plan(requests)
        return gathered

    def prepare_attn(self, input_batch: Any) -> Any:
        """Block tables and slots of the batch, which a step of the core reads too.

        With tokens that wait for their upper layers it reads the requests' own block tables: those
        of the batch may lack what lies behind a sliding window, where such a token still attends.
        """
        block_tables, slots = super().prepare_attn(input_batch)
        if self.planned_step is not None:
            tables = self.block_tables
            own = self.planned_step.plan.shape.pending
            groups = [
                CacheGroup(
                    layer_names=group.layer_names,
                    block_size=tables.block_sizes[index],
                    blocks=tables.block_tables[index].gpu[input_batch.idx_mapping]
                    if own
                    else block_tables[index][: input_batch.num_reqs],
                    slots=slots[index][: input_batch.num_tokens],
                )
                for index, group in enumerate(self.kv_cache_config.kv_cache_groups)
            ]
            self._buffers = BatchBuffers(
                seq_lens=input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs],
                prompt_lens=torch.from_numpy(input_batch.prefill_len_np),
                groups=groups,
                builders=self._builders,
            )
        return block_tables, slots

    def take_step(self) -> RoutedStep | None:
        """The core's step that is about to run; None is vLLM's."""
        step, self.planned_step = self.planned_step, None
        return step

    def _before(self, stock: Any) -> Any:
        """The model's `forward`, or the core's run of the layers."""

        def forward(*args: Any, **inputs: Any) -> Any:
            buffers, self._buffers = self._buffers, None
            step = self.take_step()
            if step is None:
                return stock(*args, **inputs)
            assert buffers is not None
            positions, input_ids = inputs["positions"], inputs["input_ids"]
            return self.core.run(step, positions, input_ids, inputs["inputs_embeds"], buffers)

        return forward
