"""Seam: attention metadata for a subset of a step's rows, and the K/V write on its own.

vLLM builds metadata for the whole batch. A layer that some rows skip needs it for the others:
their query ranges, sequence lengths, block tables and slots, taken from the runner's buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import CommonAttentionMetadata

from sluice.models.plan import Rows


@dataclass(frozen=True, slots=True)
class RowsContext:
    """Attention metadata and K/V slots of one set of rows, by layer name."""

    metadata: dict[str, Any]
    slots: dict[str, torch.Tensor]


@contextmanager
def rows_forward_context() -> Iterator[ForwardContext]:
    """The step's forward context with its own dictionaries, for the loop to change per layer.

    `all_moe_layers` is dropped: vLLM's mixture-of-experts op would otherwise take layer names in
    the order of calls, which a skipped layer breaks. `is_padding` covers the whole batch and
    would not fit a subset of its rows.
    """
    step = get_forward_context()
    own = replace(
        step,
        attn_metadata=dict(step.attn_metadata),
        slot_mapping=dict(step.slot_mapping),
        all_moe_layers=None,
        is_padding=None,
    )
    with override_forward_context(own):
        yield own


def build_rows_context(runner: Any, rows: Rows) -> RowsContext:
    """Metadata for `rows` of the step that `runner` has prepared."""
    device = runner.device
    requests = torch.from_numpy(rows.requests)
    lengths = torch.from_numpy(rows.lengths)
    starts_cpu = torch.zeros(len(rows.requests) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=starts_cpu[1:])
    seq_lens_cpu = runner.optimistic_seq_lens_cpu[requests] - torch.from_numpy(rows.trailing)
    seq_lens_cpu = seq_lens_cpu.to(torch.int32)
    on_device = requests.to(device)
    index = rows.index(device)
    prompt = runner.input_batch.num_prompt_tokens_cpu_tensor[requests]
    common = CommonAttentionMetadata(
        query_start_loc=starts_cpu.to(device),
        query_start_loc_cpu=starts_cpu,
        seq_lens=seq_lens_cpu.to(device),
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_reqs=len(rows.requests),
        num_actual_tokens=len(rows),
        max_query_len=int(rows.lengths.max()),
        max_seq_len=int(seq_lens_cpu.max()),
        block_table_tensor=torch.empty(0),
        slot_mapping=torch.empty(0),
        causal=True,
        is_prefilling=seq_lens_cpu - lengths < prompt,
        positions=runner.positions[index],
    )
    metadata: dict[str, Any] = {}
    slots: dict[str, torch.Tensor] = {}
    for group_id, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        table = runner.input_batch.block_table[group_id]
        common = common.replace(
            block_table_tensor=table.get_device_tensor(runner.input_batch.num_reqs)[on_device],
            slot_mapping=table.slot_mapping.gpu[index],
        )
        for attention_group in runner.attn_groups[group_id]:
            built = attention_group.build_metadata(common)
            metadata.update(dict.fromkeys(attention_group.layer_names, built))
        slots.update(dict.fromkeys(group.layer_names, common.slot_mapping))
    return RowsContext(metadata, slots)


def write_keys_values(attention_op: Any, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write K/V at the forward context's slots, without attending.

    Args:
        attention_op: vLLM `Attention` layer.
        key: (rows, kv_heads * head_size), after rotary embedding.
        value: (rows, kv_heads * head_size).
    """
    torch.ops.vllm.unified_kv_cache_update(
        key.view(-1, attention_op.num_kv_heads, attention_op.head_size),
        value.view(-1, attention_op.num_kv_heads, attention_op.head_size_v),
        _encode_layer_name(attention_op.layer_name),
    )
