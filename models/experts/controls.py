"""One policy's expert controls as arrays over layers and experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sluice.models.policy.axes import BoolArray, Float32Array, IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import ExpertId, ExpertPolicy


@dataclass(frozen=True, slots=True)
class LayerControls:
    """Controls of one policy; first dimension is the layers with experts, in order.

    Attributes:
        k: int64, (layers,).
        bias: fp32, (layers, experts); -inf masks.
        dropped: bool, (layers, experts).
        forced: bool, (layers, experts).
        forced_weight: fp32, (layers, experts); NaN is the mean of the others.
        ratio: fp32, (layers,); 0 cuts nothing.
        top_p: fp32, (layers,); inf cuts nothing: shares of 1 may add up to a little more.
        protected: bool, (layers, experts).
        weak_rank: rank of the one expert of a weak pass, or -1.
        active: bool, (layers,): the policy does something in the layer, budget and re-mix apart.
    """

    k: IntArray
    bias: Float32Array
    dropped: BoolArray
    forced: BoolArray
    forced_weight: Float32Array
    ratio: Float32Array
    top_p: Float32Array
    protected: BoolArray
    weak_rank: int
    active: BoolArray

    @classmethod
    def from_policy(
        cls,
        policy: ExpertPolicy,
        shape: ExpertShape,
        super_experts: Iterable[ExpertId],
        *,
        weak: bool = False,
    ) -> LayerControls:
        """Spread a policy out.

        Args:
            policy: checked against `shape`.
            shape: of the model's experts.
            super_experts: of the profile.
            weak: the controls of the weak pass of `policy.contrast`.
        """
        moe_index = {layer: index for index, layer in enumerate(shape.layers)}
        count, experts = len(shape.layers), shape.experts

        def marked(ids: Iterable[ExpertId]) -> BoolArray:
            marks = np.zeros((count, experts), dtype=np.bool_)
            for layer, expert in ids:
                marks[moe_index[layer], expert] = True
            return marks

        bias = np.zeros((count, experts), dtype=np.float32)
        for layer, expert, value in policy.bias:
            bias[moe_index[layer], expert] = value
        bias[marked(policy.masked)] = -np.inf
        weights = np.full((count, experts), np.nan, dtype=np.float32)
        for layer, expert, weight in policy.forced:
            if weight is not None:
                weights[moe_index[layer], expert] = weight
        k = np.array(_by_layer(policy.top_k, shape, shape.top_k), dtype=np.int64)
        ratio = np.array(_by_layer(policy.skip_ratio, shape, 0.0), dtype=np.float32)
        top_p = np.full(count, np.inf if policy.top_p is None else policy.top_p, dtype=np.float32)
        dropped = marked(policy.dropped)
        forced = marked((layer, expert) for layer, expert, _ in policy.forced)
        contrast = policy.contrast
        active = (
            (k != shape.top_k)
            | (bias != 0).any(axis=1)
            | dropped.any(axis=1)
            | forced.any(axis=1)
            | (ratio > 0)
            | (top_p < np.inf)
        )
        return cls(
            k=k,
            bias=bias,
            dropped=dropped,
            forced=forced,
            forced_weight=weights,
            ratio=ratio,
            top_p=top_p,
            protected=marked(super_experts if policy.protect else ()),
            weak_rank=contrast.weak_rank if weak and contrast is not None else -1,
            active=active | weak,
        )


def _by_layer(
    value: float | tuple[float, ...] | None, shape: ExpertShape, stock: float
) -> list[float]:
    """One number per layer with experts, from one for all or one per decoder layer."""
    if isinstance(value, tuple):
        return [value[layer] for layer in shape.layers]
    return [stock if value is None else value] * len(shape.layers)
