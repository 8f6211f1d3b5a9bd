"""The training objective of the demo model: early-exit, load-balancing and layer-dropout terms.

The early-exit loss and the layer dropout follow LayerSkip (Elhoushi et al., ACL 2024, arXiv
2404.16710), without its curricula: every exit is trained in every step, at answer positions only,
which keeps it cheap.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sluice.models.offline.demo.training.packing import Batch

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM


@dataclass(frozen=True)
class Forward:
    """What one pass gives.

    Attributes:
        exits: per layer, hidden states after it at the answer positions, [answers, hidden].
        router_logits: per layer, [tokens, experts].
    """

    exits: list[Tensor]
    router_logits: list[Tensor]


def exit_weights(layers: int, scale: float) -> list[float]:
    """Weigh the exits of LayerSkip's loss, summing to one: ``scale`` 0 trains the last layer only.

    Layer ``l`` gets ``scale * (0 + ... + l)``, the last one
    ``layers - 1 + scale * (0 + ... + layers - 2)``.
    """
    raw = [scale * layer * (layer + 1) / 2 for layer in range(layers)]
    raw[-1] = layers - 1 + scale * (layers - 2) * (layers - 1) / 2
    return [weight / sum(raw) for weight in raw]


def dropout_rates(layers: int, maximum: float) -> list[float]:
    """Give LayerSkip's per-layer dropout rates: 0 at the first layer, ``maximum`` at the last."""
    return [maximum * (math.exp(layer * math.log(2) / (layers - 1)) - 1) for layer in range(layers)]


def draw_dropout(rates: list[float], rows: int, generator: torch.Generator) -> Tensor:
    """Draw which rows skip which layers: [layers, rows] bool."""
    return torch.rand(len(rates), rows, generator=generator) < torch.tensor(rates)[:, None]


@contextmanager
def _recorded_router_logits(model: "Qwen3MoeForCausalLM") -> Iterator[list[Tensor]]:
    logits: list[Tensor] = []

    def record(_module: nn.Module, _arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits.append(output[0])

    handles = [layer.mlp.gate.register_forward_hook(record) for layer in model.model.layers]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def forward(model: "Qwen3MoeForCausalLM", batch: Batch, dropped: Tensor | None = None) -> Forward:
    """Run the decoder and collect the hidden state after every layer.

    Args:
        model: the model.
        batch: packed conversations on the model's device.
        dropped: [layers, rows] bool, rows that skip a layer.
    """
    hidden = model.model.embed_tokens(batch.ids)
    rotary = model.model.rotary_emb(hidden, batch.positions)
    exits: list[Tensor] = []
    with _recorded_router_logits(model) as router_logits:
        for index, layer in enumerate(model.model.layers):
            out = layer(hidden, attention_mask=batch.attention, position_embeddings=rotary)
            if dropped is not None:
                out = torch.where(dropped[index][:, None, None], hidden, out)
            hidden = out
            exits.append(hidden.flatten(0, 1)[batch.where])
    return Forward(exits, router_logits)


def logits_at_exit(model: "Qwen3MoeForCausalLM", hidden: Tensor) -> Tensor:
    """Apply the shared final norm and LM head: [answers, hidden] to [answers, vocabulary]."""
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def answer_weights(batch: Batch) -> Tensor:
    """Weigh answer tokens so that long answers do not drown short ones: [answers], mean 1.

    A token of an ``n``-token answer gets a weight proportional to ``n ** -0.5``.
    """
    lengths = torch.bincount(batch.segment_of)[batch.segment_of]
    weights = lengths.float().rsqrt()
    return weights / weights.mean()


def early_exit_loss(
    logits: list[Tensor], targets: Tensor, exits: list[float], answers: Tensor
) -> Tensor:
    """Sum the cross-entropies of the exits.

    Args:
        logits: per exit, [answers, vocabulary].
        targets: [answers] token ids.
        exits: weight of each exit.
        answers: [answers] weight of each token, mean 1.
    """
    total = logits[0].new_zeros(())
    for exit_logits, weight in zip(logits, exits, strict=True):
        if weight:
            each = nn.functional.cross_entropy(exit_logits, targets, reduction="none")
            total = total + weight * (each * answers).mean()
    return total


def balance_loss(router_logits: list[Tensor], used: Tensor, top_k: int) -> Tensor:
    """Average the load-balancing loss of Switch Transformers (arXiv 2101.03961) over layers.

    It is 1 when the experts of every layer are used equally, and more otherwise.

    Args:
        router_logits: per layer, [tokens, experts].
        used: [tokens] bool, false on padding.
        top_k: experts chosen per token.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits[used].softmax(-1)
        chosen = probabilities.topk(top_k).indices
        load = torch.bincount(chosen.flatten(), minlength=logits.size(-1)) / chosen.numel()
        losses.append(logits.size(-1) * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def exact_matches(logits: Tensor, batch: Batch) -> Tensor:
    """Say per conversation whether every answer token is the likeliest one: [conversations] bool.

    A conversation passes exactly when greedy decoding would give its answers.
    """
    wrong = logits.argmax(-1) != batch.targets
    misses = torch.zeros(len(batch.tasks), device=wrong.device)
    misses.index_add_(0, batch.segment_of, wrong.float())
    return misses == 0
