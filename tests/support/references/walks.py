"""Greedy decoding with transformers' cache, to hold the plain reference against.

Exits are walked as their papers describe the cache: propagation as in CALM, recomputation as in
EE-LLM's released loop, where every token since the last full pass is in the step's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from support.reference import Reference
from torch import Tensor

from sluice.models.policy.policy import ExitRule, MissingKV

from .exits import ExitTest


def layer_inputs(
    reference: Reference, tokens: list[int], start: int
) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings, and what a decoder layer is called with, for tokens from position `start`."""
    model = reference.model.model
    hidden = model.embed_tokens(torch.tensor([tokens]))
    positions = torch.arange(start, start + len(tokens))
    hides = torch.arange(start + len(tokens)) > positions[:, None]
    mask = torch.zeros(hides.shape).masked_fill(hides, -torch.inf)[None, None]
    rotary = model.rotary_emb(hidden, position_ids=positions[None])
    return hidden, {"attention_mask": mask, "position_embeddings": rotary}


@torch.no_grad()
def cached_walk(
    reference: Reference,
    rule: ExitRule,
    heads: Mapping[str, Tensor],
    prompt: list[int],
    tokens: int,
    max_tokens: int,
    pending_limit: int = 8,
    block_size: int = 32,
) -> tuple[list[int], list[int | None], Any]:
    """Tokens, exits and cache of greedy decoding with exits, one cached step after the other."""
    model, cache = reference.model.model, transformers.DynamicCache()

    def head(state: Tensor) -> Tensor:
        return reference.model.lm_head(model.norm(state))

    sequence = list(prompt)
    logits = reference.model(torch.tensor([sequence]), past_key_values=cache).logits[0, -1]
    sequence.append(int(logits.argmax()))
    exits: list[int | None] = []
    waiting = 0
    for index in range(tokens - 1):
        start = len(sequence) - 1 - waiting
        if waiting:
            cache.crop(start)
        hidden, inputs = layer_inputs(reference, sequence[start:], start)
        test = ExitTest(rule, head, heads, index, max_tokens)
        recompute = rule.kv is MissingKV.RECOMPUTE
        forced = recompute and (waiting == pending_limit or len(sequence) % block_size == 0)
        left = None
        for i, layer in enumerate(model.layers):
            if left is not None:
                normed = layer.input_layernorm(hidden)
                layer.self_attn(hidden_states=normed, past_key_values=cache, **inputs)
                continue
            before, hidden = hidden, layer(hidden, past_key_values=cache, **inputs)
            if not forced and i in rule.layers:
                score = test.score(before[0, -1], hidden[0, -1])
                left = i if test.leaves(score) else None
        exits.append(left)
        waiting = waiting + 1 if recompute and left is not None else 0
        sequence.append(int(head(hidden[0, -1]).argmax()))
    return sequence[len(prompt) :], exits, cache


@torch.no_grad()
def chosen_walk(
    reference: Reference, tokens: list[int], goes_on: Callable[[int, Tensor, Tensor], Tensor]
) -> tuple[int, Any]:
    """Next token and cache where `goes_on(layer, before, after)` says what each layer passes on."""
    cache = transformers.DynamicCache()
    hidden, inputs = layer_inputs(reference, tokens, 0)
    for i, layer in enumerate(reference.model.model.layers):
        after = layer(hidden, past_key_values=cache, **inputs)
        hidden = goes_on(i, hidden, after)
    normed = reference.model.model.norm(hidden[0, -1])
    return int(reference.model.lm_head(normed).argmax()), cache


def full_cache(reference: Reference, sequence: list[int]) -> Any:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        reference.model(torch.tensor([sequence]), past_key_values=cache)
    return cache


def assert_same_kv(keys: list[Tensor], values: list[Tensor], cache: Any) -> None:
    assert len(keys) == len(values) == len(cache.layers)
    for key, value, layer in zip(keys, values, cache.layers, strict=True):
        torch.testing.assert_close(key, layer.keys[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, layer.values[0], rtol=1e-4, atol=1e-4)
