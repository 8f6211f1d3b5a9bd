"""Runs of the demo model on one-turn conversations, with what each position is and may change.

A teacher-forced run decides what decoding would: under a causal mask a generated position depends
on what lies before it alone, so all of an answer's decode steps fit in one pass. Positions of the
prompt, of which the last gives the first answer token, always run every layer.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sluice.models.demo import losses
from sluice.models.demo.experts import IMPLEMENTATION, register_experts_implementation
from sluice.models.demo.packing import (
    SYSTEM_MESSAGES,
    SYSTEM_SHARE,
    Batch,
    Encoder,
    Segment,
    pack,
)
from sluice.models.demo.tasks import TASKS, Item, distinct, generate
from sluice.models.depth.method import row_cosine

Model = Any
"""A transformers decoder of the Qwen3-MoE architecture, fp32, in evaluation mode."""

Pick = Callable[[int, Tensor, Tensor], Tensor]
"""What a layer gives: (layer, state before it, state after it) to a state, (rows, tokens, hidden).
"""


def load_model(folder: Path) -> Model:
    """Load a weights folder in fp32, frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    register_experts_implementation()
    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation(IMPLEMENTATION)
    return model.requires_grad_(False).train(False)


@dataclass(frozen=True)
class Conversations:
    """Packed one-turn conversations.

    Attributes:
        batch: the packed rows.
        owner: (rows, tokens) index of each position's conversation; that of padding means nothing.
        prompt: (rows, tokens) bool, positions of a prompt.
        generated: (rows, tokens) bool, positions that a decode step would run.
        decoded: (answers,) bool, entries of `batch.where` that are generated positions.
    """

    batch: Batch
    owner: Tensor
    prompt: Tensor
    generated: Tensor
    decoded: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], max_rows: int | None = None) -> "Conversations":
        """Pack segments of one turn each; those beyond `max_rows` rows are left out."""
        batch = pack(segments, max_rows)
        owner = ((batch.positions == 0) & batch.used).flatten().cumsum(0) - 1
        position = batch.positions.flatten()
        last = torch.full((len(batch.tasks),), int(position.max()))
        last.scatter_reduce_(0, batch.segment_of, position[batch.where], "amin")
        prompt = (position <= last[owner]) & batch.used.flatten()
        generated = torch.zeros_like(prompt)
        generated[batch.where] = True
        generated &= ~prompt
        shape = batch.ids.shape
        return cls(
            batch,
            owner.view(shape),
            prompt.view(shape),
            generated.view(shape),
            generated[batch.where],
        )

    def prompt_mean(self, states: Tensor) -> Tensor:
        """Mean over each prompt's tokens: (rows, tokens, hidden) to (conversations, hidden)."""
        sums = states.new_zeros(len(self.batch.tasks), states.size(-1))
        sums.index_add_(0, self.owner[self.prompt], states[self.prompt])
        return sums / torch.bincount(self.owner[self.prompt])[:, None]


def draw(seed: int, rows: int) -> Conversations:
    """Draw conversations of the training split, all tasks alike, to fill rows of 128 tokens."""
    rng = random.Random(seed)
    streams = {task: generate(task, "train", rng.getrandbits(48)) for task in TASKS}
    encoder = Encoder()
    segments: list[Segment] = []
    while sum(len(segment.ids) for segment in segments) < 0.96 * rows * 128:
        system = rng.choice(SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else None
        segments.append(encoder.encode([next(streams[rng.choice(TASKS)])], system))
    return Conversations.of(segments, rows)


def heldout(items_per_task: int, seed: int) -> Iterator[Conversations]:
    """Different held-out items, one task after the other."""
    for task in TASKS:
        items: list[Item] = distinct(task, "heldout", seed, items_per_task)
        yield Conversations.of([Encoder().encode([item]) for item in items])


def run(model: Model, batch: Batch, pick: Pick | None = None) -> list[Tensor]:
    """States before the first and after every layer, (rows, tokens, hidden) each.

    Args:
        model: the model.
        batch: what to run.
        pick: replaces a layer's output; keys and values of the next layers come from what it gives,
            as with K/V propagation.
    """
    states = [model.model.embed_tokens(batch.ids)]
    rotary = model.model.rotary_emb(states[0], batch.positions)
    for index, layer in enumerate(model.model.layers):
        before = states[-1]
        after = layer(before, attention_mask=batch.attention, position_embeddings=rotary)
        states.append(after if pick is None else pick(index, before, after))
    return states


def answer_logits(model: Model, states: Tensor, batch: Batch) -> Tensor:
    """Final norm and LM head at the answers: (rows, tokens, hidden) to (answers, vocabulary)."""
    return losses.logits_at_exit(model, states.flatten(0, 1)[batch.where])


@torch.no_grad()
def importance(model: Model, batch: Batch) -> dict[str, list[float]]:
    """LLM-Drop's importance `1 - cos` per layer (arXiv 2406.15786), mean over tokens, fp32.

    `attention` compares a layer's input x with x + Attn(LN(x)), `mlp` that sum with the layer's
    output, `block` input with output.
    """
    middles: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Tensor]) -> None:
        middles.append(arguments[0])

    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(record)
        for layer in model.model.layers
    ]
    try:
        states = run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()

    def change(a: Tensor, b: Tensor) -> float:
        return 1.0 - float(row_cosine(a[batch.used], b[batch.used]).mean())

    layers = list(zip(states[:-1], middles, states[1:], strict=True))
    return {
        "block": [change(before, after) for before, _, after in layers],
        "attention": [change(before, middle) for before, middle, _ in layers],
        "mlp": [change(middle, after) for _, middle, after in layers],
    }
