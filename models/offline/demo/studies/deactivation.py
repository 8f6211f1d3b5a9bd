"""Experts of the demo model taken away in plain transformers, as `routing.experts.deactivate` does.

For finding experts before a server is asked: many sets can be tried on one teacher-forced batch.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from sluice.models.offline.hf_model.moe import MoeLayer, rerouted
from sluice.models.policy.experts import ExpertId

Mode = Literal["mask", "drop"]
"""Before top-k, where the next best takes the slot, or after it, where the slot stays empty."""


@contextmanager
def deactivated(
    routers: Mapping[int, MoeLayer], experts: Collection[ExpertId], mode: Mode
) -> Iterator[None]:
    """Take experts away from every token of the passes within.

    Args:
        routers: of the model, by layer.
        experts: (layer, expert) to take away.
        mode: how.

    Raises:
        ValueError: a layer cannot spare so many (`most_away`).
    """
    taken = {
        layer: torch.zeros(routers[layer].count, dtype=torch.bool) for layer, _ in sorted(experts)
    }
    for layer, expert in experts:
        taken[layer][expert] = True
    for layer, mask in taken.items():
        most = most_away(routers[layer], mode)
        if int(mask.sum()) > most:
            raise ValueError(f"layer {layer}: {int(mask.sum())} experts away, {most} may be")

    def route(router: MoeLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
        out = taken[router.layer].to(scores.device)
        if mode == "mask":
            return router.choose(scores.masked_fill(out, 0.0))
        chosen, ids = scores.topk(router.spec.top_k, dim=-1)
        return router.weights(chosen.masked_fill(out[ids], 0.0)), ids

    with rerouted({layer: routers[layer] for layer in taken}, route):
        yield


def most_away(router: MoeLayer, mode: Mode) -> int:
    """Experts that a layer can spare, as the server counts: a token keeps `top_k` to choose from.

    With `drop` it keeps one of the `top_k` that it chose.
    """
    top_k = router.spec.top_k
    return router.count - top_k if mode == "mask" else top_k - 1
