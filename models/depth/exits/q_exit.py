"""Q-exit: leave when a trained halting head has spent a share of its exit probability.

Source: PALBERT, "Teaching ALBERT to Ponder" (NeurIPS 2022). The head is a three-layer perceptron
on the residual stream after and before the layer; tanh between its layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint
from sluice.models.depth.parameters import Number

if TYPE_CHECKING:
    from torch import Tensor


class QExit(ExitMethod):
    """`1 - prod(1 - lambda_j)` over the exits so far is more than the threshold."""

    name = "q_exit"
    description = "once a trained head sees no more gain"
    source = "PALBERT (NeurIPS 2022)"
    parameters = {"threshold": Number(0.0, 1.0, default=0.5)}
    needs_previous = True
    profile_tensors = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    """(inner, 2 hidden), (inner,), (inner, inner), (inner,), (1, inner), (1,); fp32."""

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        import torch

        assert at.previous is not None
        x = torch.cat([at.hidden, at.previous], dim=-1).float()
        for part in range(3):
            x = x @ at.tensors[f"{part}.weight"].T + at.tensors[f"{part}.bias"]
            x = x.tanh() if part < 2 else x
        stays = torch.sigmoid(-x.squeeze(-1)) * at.state.get("stays", 1.0)
        at.state["stays"] = stays
        return 1.0 - stays > at.threshold
