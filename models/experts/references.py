"""Reference pathways of a profile, and the search for those near a prompt.

The search is a dense product of the prompt's embedding with all of a set's; it runs on a thread of
its own from the moment the request arrives, beside the steps until its last prompt token runs.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sluice.models.expert_policy import Remix
from sluice.models.profile import Profile


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

    def pathways_of(self, layer: int) -> torch.Tensor:
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
        places = [self._layers.index(layer) for layer in remix.layers]
        found = self._pathways[places][:, chosen.to(self._pathways.device)]
        weights = weights.to(found.device)
        total = weights.sum()
        mean = (weights[:, None] * found).sum(1)
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
