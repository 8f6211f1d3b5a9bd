"""Re-mix (C3PO, arXiv 2504.07964): router probabilities pulled towards reference pathways.

A pathway is a token's router probabilities over the critical layers. The references are samples
that the model answers well; `sluice.models.experts.references` finds those near a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future

import torch

from sluice.models.expert_policy import Remix
from sluice.models.experts.references import ReferenceStore, kernel_weights


class Pathway(ABC):
    """Where a request's reference probabilities come from.

    Attributes:
        remix: what the request asked for.
    """

    def __init__(self, remix: Remix) -> None:
        self.remix = remix

    @abstractmethod
    def reference(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """Reference probabilities of some rows.

        Args:
            layer: decoder layer, one of `remix.layers`.
            scores: fp32, (rows, experts), the rows' own.

        Returns:
            fp32, broadcastable to (rows, experts); zeros leave a row as it is.
        """


class FixedPathway(Pathway):
    """One pathway for all rows, which may still be on its way (`kernel`, `supplied`)."""

    def __init__(self, remix: Remix, pathway: Future[torch.Tensor]) -> None:
        super().__init__(remix)
        self._pathway = pathway

    def reference(self, layer: int, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See `Pathway.reference`."""
        return self._pathway.result()[self.remix.layers.index(layer)]


class ModePathway(Pathway):
    """One mean-shift step per layer in the space of the row's own probabilities (`mode`).

    The paper shifts whole pathways; a row's later layers are not known while it runs, so every
    layer looks for its own neighbours.
    """

    def __init__(self, remix: Remix, store: ReferenceStore) -> None:
        super().__init__(remix)
        self._store = store

    def reference(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """See `Pathway.reference`."""
        remix = self.remix
        assert remix.neighbors is not None
        pathways = self._store.pathways_of(layer)
        squares = torch.cdist(scores, pathways, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        nearest = squares.sort(dim=-1, stable=True).indices[:, : remix.neighbors]
        found = pathways[nearest]
        cosine = torch.cosine_similarity(scores.unsqueeze(1), found, dim=-1)
        weights = kernel_weights(remix, squares.gather(1, nearest), cosine)
        total = weights.sum(-1, keepdim=True)
        mean = (weights.unsqueeze(-1) * found).sum(1) / total
        return torch.where(total > 0, mean, torch.zeros_like(mean))


def supplied_pathway(remix: Remix, device: torch.device) -> FixedPathway:
    """The pathway that came with the request."""
    pathway: Future[torch.Tensor] = Future()
    pathway.set_result(torch.tensor(remix.pathway, dtype=torch.float32, device=device))
    return FixedPathway(remix, pathway)
