"""Seam: vLLM's V1 model runner (`GPUModelRunner`, `CPUModelRunner`), from batch to forward pass.

`RoutedV1Runner` is mixed in front of a V1 runner class. The core learns of requests when vLLM
removes or adds their state (`_update_states`, `_on_request_state_removed`), and plans the step
once its inputs are prepared (`_prepare_inputs`). Its forward pass is vLLM's or the core's
(`_model_forward`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sluice.models.engine.attention import BatchBuffers, CacheGroup
from sluice.models.engine.row_builders import RowBuilders
from sluice.models.engine.runners.base import RoutedRunner
from sluice.models.engine.runners.seams import BOTH, TELEMETRY, V1
from sluice.models.engine.step import RoutedStep, StepRequests


class RoutedV1Runner(RoutedRunner):
    """Mixin for V1 model runners; see the module."""

    seams = (*BOTH, *TELEMETRY, *V1)
    _step: RoutedStep | None = None

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does."""
        super().initialize_kv_cache(*args, **kwargs)
        self._builders = RowBuilders(
            self.attn_groups, self._kernel_block_sizes, self.vllm_config, self.device
        )

    def _update_states(self, scheduler_output: Any) -> Any:
        # First vLLM's part: it drops ended requests, and an id may end and come back in one step.
        corrections = super()._update_states(scheduler_output)
        self.core.begin_step(scheduler_output, self.kv_caches)
        for request in scheduler_output.scheduled_new_reqs:
            self.core.add(request)
        cached = scheduler_output.scheduled_cached_reqs
        if cached.resumed_req_ids:
            generated = dict(zip(cached.req_ids, cached.num_output_tokens, strict=True))
            for request_id in cached.resumed_req_ids:
                self.core.resume(request_id, generated[request_id])
        return corrections

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.core.remove(req_id)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        n = batch.num_reqs
        requests = StepRequests(
            ids=batch.req_ids[:n],
            scheduled=num_scheduled_tokens.astype(np.int64),
            computed=batch.num_computed_tokens_cpu[:n].astype(np.int64),
            prompt=batch.num_prompt_tokens[:n].astype(np.int64),
        )
        self._step = self.core.plan(requests)
        return prepared

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
        if model_kwargs:
            raise RuntimeError(f"depth control reached an engine without it ({model_kwargs=})")
        return self.core.run(step, positions, input_ids, inputs_embeds, self._buffers(step))

    def _buffers(self, step: RoutedStep) -> BatchBuffers:
        batch = self.input_batch
        tokens = int(step.requests.scheduled.sum())
        groups = []
        for index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            table = batch.block_table[index]
            groups.append(
                CacheGroup(
                    layer_names=group.layer_names,
                    block_size=table.block_size,
                    blocks=table.get_device_tensor(batch.num_reqs),
                    slots=table.slot_mapping.gpu[:tokens],
                )
            )
        return BatchBuffers(
            seq_lens=self.optimistic_seq_lens_cpu[: batch.num_reqs],
            prompt_lens=batch.num_prompt_tokens_cpu_tensor[: batch.num_reqs],
            groups=groups,
            builders=self._builders,
        )
