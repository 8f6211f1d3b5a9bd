"""Re-mix (C3PO, arXiv 2504.07964): router probabilities pulled towards reference pathways.

A pathway is a token's router probabilities over the critical layers. The references are samples
that the model answers well; they come with a profile (`ReferenceStore`).

Those near a prompt are found by a dense product of its embedding with all of a set's. The search
runs on a thread of its own from the moment the request arrives (`Retrieval`), beside the steps
until the prompt's last token runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sluice.models.policy.experts import Remix
from sluice.models.profile.profile import Profile


class ReferenceStore:
    """One reference set on the model's device."""

    def __init__(self, profile: Profile, name: str, device: torch.device) -> None:
        self._layers = profile.references[name].layers
        tensors = profile.reference_tensors(name)
        embeddings = tensors["embeddings"].float()
        self._center = embeddings.mean(0)
        self._directions = torch.nn.functional.normalize(embeddings - self._center, dim=-1)
        # (layers, references, experts)
        self._pathways = tensors["pathways"].float().transpose(0, 1).contiguous().to(device)

    def pathways(self, layer: int) -> torch.Tensor:
        """Probabilities of all references in a decoder layer, fp32, (references, experts)."""
        return self._pathways[self._layers.index(layer)]

    def regress(self, remix: Remix, embedding: torch.Tensor) -> torch.Tensor:
        """Kernel regression: the mean pathway of the nearest references.

        Args:
            remix: settings.
            embedding: of the prompt, fp32, (width,).

        Returns:
            fp32, (remix.layers, experts); zeros if no reference is near enough to count.
        """
        assert remix.neighbors is not None
        assert remix.max_similarity is not None
        direction = torch.nn.functional.normalize(embedding.cpu().float() - self._center, dim=-1)
        cosine = self._directions @ direction
        # Rounding takes a prompt's similarity to itself past 1.
        near = torch.nonzero(
            (cosine <= remix.max_similarity) | (remix.max_similarity >= 1.0)
        ).flatten()
        ranked = cosine[near].sort(descending=True, stable=True).indices[: remix.neighbors]
        chosen = near[ranked]
        weights = kernel_weights(remix, 2.0 - 2.0 * cosine[chosen], cosine[chosen])
        layers = [self._layers.index(layer) for layer in remix.layers]
        neighbours = self._pathways[layers][:, chosen.to(self._pathways.device)]
        weights = weights.to(neighbours.device)
        total = weights.sum()
        mean = (weights[:, None] * neighbours).sum(1)
        return mean / total if total > 0 else torch.zeros_like(mean)


def kernel_weights(remix: Remix, squares: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
    """Weights of neighbours, up to a common factor, fp32, (..., neighbours).

    Args:
        remix: settings.
        squares: squared distances, (..., neighbours).
        cosine: similarities, (..., neighbours).
    """
    if remix.kernel == "cosine":
        return cosine.clamp(min=0.0)
    assert remix.bandwidth is not None
    if squares.shape[-1] == 0:
        return squares
    # From the nearest on: a narrow kernel must not underflow for all of them.
    beyond = squares - squares.amin(-1, keepdim=True)
    return torch.exp(-beyond / (2.0 * remix.bandwidth**2))


def prompt_embedding(embeddings: torch.Tensor) -> torch.Tensor:
    """The model's own embedding of a prompt: the mean of its input embeddings, fp32, (hidden,).

    Args:
        embeddings: (tokens, hidden).
    """
    return embeddings.float().mean(0)


class Retrieval:
    """Searches in the background, one thread for all requests."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sluice-references")

    def start(
        self, store: ReferenceStore, remix: Remix, embedding: torch.Tensor
    ) -> Future[torch.Tensor]:
        """Begin a search; see `ReferenceStore.regress`."""
        return self._thread.submit(store.regress, remix, embedding)


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
        pathways = self._store.pathways(layer)
        squares = torch.cdist(scores, pathways, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        nearest = squares.sort(dim=-1, stable=True).indices[:, : remix.neighbors]
        neighbours = pathways[nearest]
        cosine = torch.cosine_similarity(scores.unsqueeze(1), neighbours, dim=-1)
        weights = kernel_weights(remix, squares.gather(1, nearest), cosine)
        total = weights.sum(-1, keepdim=True)
        mean = (weights.unsqueeze(-1) * neighbours).sum(1) / total
        return torch.where(total > 0, mean, torch.zeros_like(mean))


def supplied_pathway(remix: Remix, device: torch.device) -> FixedPathway:
    """The pathway that came with the request."""
    pathway: Future[torch.Tensor] = Future()
    pathway.set_result(torch.tensor(remix.pathway, dtype=torch.float32, device=device))
    return FixedPathway(remix, pathway)
