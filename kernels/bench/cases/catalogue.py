"""What is measured. A new operation is a new entry of `OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sluice.kernels.bench.cases.case import Case
from sluice.kernels.bench.cases.hidden_states import (
    kv_fill_cases,
    layer_stats_cases,
    row_compact_cases,
    row_scatter_cases,
)
from sluice.kernels.bench.cases.routing import (
    batch_budget_cases,
    count_selections_cases,
    route_topk_cases,
    router_scores_cases,
)
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.bench.cases.vocabulary import contrast_logits_cases, exit_test_cases


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation.

    Attributes:
        name: of it.
        cases: makes its cases at a number of rows.
        width: columns of its largest input.
        note: what a reader of its figures must know, or nothing.
    """

    name: str
    cases: Callable[[Shapes, int], tuple[Case, ...]]
    width: Callable[[Shapes], int]
    note: str = ""


def _experts(shapes: Shapes) -> int:
    return shapes.experts


def _hidden(shapes: Shapes) -> int:
    return shapes.hidden


def _keys(shapes: Shapes) -> int:
    return shapes.heads * shapes.head_size


def _vocabulary(shapes: Shapes) -> int:
    return shapes.vocabulary


OPERATIONS = (
    Entry(
        "route_topk",
        route_topk_cases,
        _experts,
        "route_topk: PyTorch is softmax and topk, vLLM its router for CPUs or its topk_softmax for "
        "CUDA; neither counts, which ours does. With all controls: policies, re-mix, shared sets.",
    ),
    Entry("router_scores", router_scores_cases, _experts),
    Entry("batch_budget", batch_budget_cases, _experts),
    Entry("count_selections", count_selections_cases, _experts),
    Entry(
        "layer_stats",
        layer_stats_cases,
        _hidden,
        "layer_stats: PyTorch is norm and cosine_similarity.",
    ),
    Entry(
        "exit_decision",
        exit_test_cases,
        _vocabulary,
        "exit_decision: PyTorch is softmax and topk for confidence, log_softmax and sum for "
        "entropy; neither gives the rest of our statistics.",
    ),
    Entry(
        "row_compact",
        row_compact_cases,
        _hidden,
        "row_compact: the reference is PyTorch's index_select; as many rows stay as go on.",
    ),
    Entry(
        "row_scatter",
        row_scatter_cases,
        _hidden,
        "row_scatter: the reference is PyTorch's index_copy_.",
    ),
    Entry("contrast_logits", contrast_logits_cases, _vocabulary),
    Entry(
        "kv_fill",
        kv_fill_cases,
        _keys,
        "kv_fill: vLLM is rms_norm, rotary_embedding and reshape_and_cache_flash, on CUDA only.",
    ),
)
"""In the order of the report."""
