"""Thresholds that an exit method is worth trying at, from strict to loose."""

from __future__ import annotations

import torch
from torch import Tensor

from sluice.models.depth.method import ExitMethod, ExitPoint, Tensors
from sluice.models.depth.parameters import Number
from sluice.models.offline.calibrate.depth.training_data import row_parts
from sluice.models.offline.hf_model.model import HFModel

_HALVINGS = 30
_CANDIDATES = 500
"""Different turning points that thresholds are chosen from, at most."""


def turning_points(
    model: HFModel,
    method: ExitMethod,
    tensors: Tensors,
    layers: tuple[int, ...],
    states: Tensor,
) -> Tensor:
    """The strictest threshold at which each token would leave at each exit, by bisection.

    The method itself is asked, so this is what it holds against its threshold.

    Args:
        model: the model.
        method: with a parameter `threshold`.
        tensors: the method's own.
        layers: after which tokens may leave, ascending.
        states: (layers + 1, tokens, hidden), the residual stream from before the first layer on.

    Returns:
        fp32, (exits, tokens); the loosest threshold for one that never leaves.
    """
    points = torch.empty(len(layers), states.size(1), dtype=torch.float32, device=states.device)
    for part in row_parts(model, states.size(1)):
        kept: dict[str, Tensor] = {}
        for index, layer in enumerate(layers):
            hidden = states[layer + 1, part]
            at = _Exit(layer, hidden, states[layer, part], _logits(model, method, hidden), kept)
            points[index, part], kept = at.turning_points(method, tensors)
    return points


def threshold_grid(
    points: Tensor, layers: tuple[int, ...], full: int, count: int, lower_is_stricter: bool
) -> list[float]:
    """Thresholds that save equally much more depth each, the strictest first.

    Args:
        points: fp32, (exits, tokens), of `turning_points`.
        layers: of the exits, ascending.
        full: layers of the model.
        count: of thresholds; fewer where several are the same.
        lower_is_stricter: as in `ExitMethod.leaves_below`.
    """
    candidates = torch.unique(points)
    if not lower_is_stricter:
        candidates = candidates.flip(0)
    size = len(candidates)
    if size > _CANDIDATES:
        candidates = candidates[torch.arange(1, _CANDIDATES + 1) * size // _CANDIDATES - 1]
    depths = [_mean_depth(points, layers, full, t, lower_is_stricter) for t in candidates]
    chosen = []
    place = 0
    for step in range(1, count + 1):
        wanted = full - (full - depths[-1]) * step / count
        while depths[place] > wanted and place < len(depths) - 1:
            place += 1
        chosen.append(float(candidates[place]))
    return list(dict.fromkeys(chosen))


def _mean_depth(
    points: Tensor, layers: tuple[int, ...], full: int, threshold: Tensor, lower_is_stricter: bool
) -> float:
    """Layers that a token runs if it leaves at the first exit that lets it."""
    leaves = points <= threshold if lower_is_stricter else points >= threshold
    depth = points.new_full(leaves.shape[1:], full)
    for layer, leaving in zip(reversed(layers), reversed(leaves.unbind(0)), strict=True):
        depth[leaving] = layer + 1
    return float(depth.mean())


class _Exit:
    """Tokens at one exit."""

    def __init__(
        self,
        layer: int,
        hidden: Tensor,
        previous: Tensor,
        logits: Tensor | None,
        kept: dict[str, Tensor],
    ) -> None:
        self._layer, self._hidden, self._previous = layer, hidden, previous
        self._logits, self._kept = logits, kept

    def turning_points(
        self, method: ExitMethod, tensors: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turning points, and what the method keeps for the next exit."""
        parameter = method.parameters["threshold"]
        assert isinstance(parameter, Number)
        loose, strict = parameter.low, parameter.high
        if method.leaves_below:
            loose, strict = strict, loose
        leaving = self._hidden.new_full((len(self._hidden),), loose, dtype=torch.float32)
        staying = torch.full_like(leaving, strict)
        kept = self._kept
        for _ in range(_HALVINGS):
            middle = (leaving + staying) / 2
            # Each question is the first one at this exit.
            kept = dict(self._kept)
            leaves = method.leaves(
                ExitPoint(
                    layer=self._layer,
                    hidden=self._hidden,
                    previous=self._previous,
                    logits=self._logits,
                    threshold=middle,
                    state=kept,
                    tensors=tensors,
                )
            )
            leaving = torch.where(leaves, middle, leaving)
            staying = torch.where(leaves, staying, middle)
        return leaving, kept


def _logits(model: HFModel, method: ExitMethod, hidden: Tensor) -> Tensor | None:
    return model.logits(hidden) if method.needs_logits else None
