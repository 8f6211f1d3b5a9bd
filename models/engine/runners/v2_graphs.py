"""Seam: CUDA graphs of vLLM's V2 model runner, and our launches of decode steps beside them.

vLLM captures the whole model once per padded batch size. After it our launches
(`sluice.models.engine.captured`) are captured for the same sizes, over the same metadata buffers.
For a step of such a size vLLM brings these up to date and then asks for its graph; there a step of
the core runs its launches. Steps that no launch serves run in no graph and without padding.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sluice.models.engine.captured.decode import CapturedDecode, DecodeBuffers
from sluice.models.engine.captured.recorders import CudaGraphs, Limits
from sluice.models.engine.startup import SEGMENTS_ENV
from sluice.models.engine.sublayers.static import StaticLayer

LIMITS = Limits(seconds=60.0, memory=1 << 30)
"""Of capturing. vLLM does not know of this memory: it comes out of what an engine leaves free."""

_LOG = logging.getLogger(__name__)


class StepGraphs:
    """Stands before a runner's choice and replay of graphs; one instance per runner."""

    def __init__(self, runner: Any) -> None:
        """Attach to a `sluice.models.engine.runners.v2.RoutedV2Runner` that has its K/V cache."""
        self._runner = runner
        manager = runner.cudagraph_manager
        self._stock_dispatch, self._stock_run = manager.dispatch, manager.run_fullgraph
        manager.dispatch, manager.run_fullgraph = self._dispatch, self._run

    def capture(self) -> None:
        """Capture launches for the sizes of vLLM's graphs, until a limit is reached."""
        from vllm.distributed.parallel_state import graph_capture
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

        runner, routed = self._runner, self._runner.routed
        sizes = self._sizes()
        # Expert controls would need their tables in buffers too; prompts of embeddings have no ids.
        if routed is None or routed.router is not None or runner.uses_inputs_embeds or not sizes:
            return
        if os.environ.get(SEGMENTS_ENV) == "off":
            return
        config = runner.vllm_config
        model, device = config.model_config, runner.device
        layers = [StaticLayer(layer) for layer in routed.stack.layers]
        buffers = DecodeBuffers.allocate(
            len(layers), sizes[-1], model.get_hidden_size(), model.dtype, device
        )
        recorder = CudaGraphs(runner.cudagraph_manager.pool)
        captured = CapturedDecode(layers, buffers, recorder, LIMITS)
        with graph_capture(device=device):
            for rows in sizes:
                metadata, slots = prepare_inputs_to_capture(
                    rows,
                    rows,
                    runner.model_state,
                    runner.input_buffers,
                    runner.block_tables,
                    runner.attn_groups,
                    runner.kv_cache_config,
                    full_cudagraph=True,
                    max_query_len=1,
                )
                with set_forward_context(metadata, config, num_tokens=rows, slot_mapping=slots):
                    if not captured.capture(rows):
                        break
        routed.loop.captured = captured
        _LOG.info(
            "captured %d launches for %d of %d batch sizes in %.0f s, %.2f GiB",
            len(captured),
            sum(rows in captured for rows in sizes),
            len(sizes),
            captured.spending.seconds,
            captured.spending.memory / (1 << 30),
        )

    def _sizes(self) -> list[int]:
        """Batch sizes of vLLM's graphs of one token per request, ascending."""
        return sorted(
            desc.num_tokens
            for desc in self._runner.cudagraph_manager.graphs
            if desc.num_reqs == desc.num_tokens and not desc.num_active_loras
        )

    def _dispatch(self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """`CudaGraphManager.dispatch`."""
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        step = self._runner.planned_step
        choice = self._stock_dispatch(num_reqs, num_tokens, *args, **kwargs)
        full = choice.cg_mode == CUDAGraphMode.FULL
        if step is None or (full and self._runner.core.captures(step, choice.num_tokens)):
            return choice
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE, num_tokens=num_tokens, num_reqs=num_reqs
        )

    def _run(self, desc: Any) -> Any:
        """`ModelCudaGraphManager.run_fullgraph`."""
        step = self._runner.take_step()
        if step is None:
            return self._stock_run(desc)
        inputs = self._runner.input_buffers
        return self._runner.core.run_captured(
            step, inputs.positions, inputs.input_ids, desc.num_tokens
        )
