"""A low-rank adapter of the residual stream, trained to make up for layers that are left out.

After a layer the state h of a token becomes `h + up @ down @ rms(h)`, with `rms(h)` the state over
its root mean square: adapters of every depth read numbers of one size.

Sources: LLM-Streamline (arXiv 2403.19135), where a light module takes the place of layers that were
pruned; LoRA (arXiv 2106.09685) for the low rank, whose `up` begins at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DOWN, UP = "down", "up"
_EPSILON = 1e-6


@dataclass(frozen=True)
class StreamAdapter:
    """What acts after one layer.

    Attributes:
        down: (rank, hidden), fp32.
        up: (hidden, rank), fp32.
    """

    down: Tensor
    up: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """The new states, in the dtype of the old ones. `states`: (..., hidden)."""
        from torch.nn.functional import rms_norm

        normed = rms_norm(states.float(), states.shape[-1:], eps=_EPSILON)
        added = (normed @ self.down.t()) @ self.up.t()
        return states + added.to(states.dtype)

    def to(self, device: torch.device) -> StreamAdapter:
        """The same on a device."""
        return StreamAdapter(self.down.to(device), self.up.to(device))


def tensor_names(name: str, layer: int) -> tuple[str, str]:
    """Names of an adapter's two tensors among those of a profile."""
    return f"adapter.{name}.{layer}.{DOWN}", f"adapter.{name}.{layer}.{UP}"


def tensors_of(name: str, adapters: Mapping[int, StreamAdapter]) -> dict[str, Tensor]:
    """The tensors of a name as a profile keeps them."""
    found: dict[str, Tensor] = {}
    for layer, adapter in adapters.items():
        down, up = tensor_names(name, layer)
        found |= {down: adapter.down, up: adapter.up}
    return found


def adapters_of(
    name: str, layers: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> dict[int, StreamAdapter]:
    """The adapters of a name, by the layer after which each acts.

    Raises:
        KeyError: a tensor is not there.
    """
    return {
        layer: StreamAdapter(*(tensors[each] for each in tensor_names(name, layer)))
        for layer in layers
    }
