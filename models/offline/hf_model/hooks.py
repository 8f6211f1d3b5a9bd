"""Passes over the model with something that watches, or changes, the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.policy.policy import SkipSet

StreamHook = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""(layer, state before it, state between attention and MLP, state after it) to what the next layer
gets instead, or None; all (rows, tokens, hidden). What a layer gets is what its keys and values
come from, as with K/V propagation.
"""


@contextmanager
def stream_hook(model: HFModel, hook: StreamHook) -> Iterator[None]:
    """Call `hook` after each layer of the passes within, in order."""
    before: dict[int, Tensor] = {}
    middle: dict[int, Tensor] = {}

    def entered(layer: int) -> Callable[..., None]:
        def keep_input(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            before[layer] = arguments[0] if arguments else named["hidden_states"]

        return keep_input

    def halfway(layer: int) -> Callable[..., None]:
        def keep_middle(_module: Any, arguments: tuple[Any, ...]) -> None:
            middle[layer] = arguments[0]

        return keep_middle

    def left(layer: int) -> Callable[..., Any]:
        def replace(_module: Any, _arguments: Any, output: Any) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            given = hook(layer, before.pop(layer), middle.pop(layer), after)
            if given is None:
                return None
            return (given, *output[1:]) if isinstance(output, tuple) else given

        return replace

    handles = []
    for layer, block in enumerate(model.blocks):
        handles.append(block.register_forward_pre_hook(entered(layer), with_kwargs=True))
        norm = block.get_submodule("post_attention_layernorm")
        handles.append(norm.register_forward_pre_hook(halfway(layer)))
        handles.append(block.register_forward_hook(left(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def final_states(model: HFModel, batch: SampleBatch, hook: StreamHook | None = None) -> Tensor:
    """Run all layers without the LM head: the residual stream, (rows, tokens, hidden)."""
    last: list[Tensor] = []

    def keep(layer: int, before: Tensor, middle: Tensor, after: Tensor) -> Tensor | None:
        given = None if hook is None else hook(layer, before, middle, after)
        if layer == model.layers - 1:
            last.append(after if given is None else given)
        return given

    with stream_hook(model, keep):
        model.causal_lm.model(input_ids=batch.ids, use_cache=False)
    return last[0]


def continued(
    model: HFModel, prompts: Sequence[tuple[int, ...]], new_tokens: int
) -> Iterator[tuple[list[int], list[Sample]]]:
    """The model's own greedy continuations at full depth, end token included.

    Yields:
        Places in `prompts`, and their samples.
    """
    from transformers import GenerationConfig

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ends = sorted(model.ends)
    # The model's own configuration may penalise repetition, and that is not greedy.
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=ends[0] if ends else 0,
        eos_token_id=ends or None,
    )
    start = 0
    while start < len(order):
        # Rows of one length need no padding on the left.
        length = len(prompts[order[start]])
        stop = start
        while stop < min(len(order), start + 64) and len(prompts[order[stop]]) == length:
            stop += 1
        places = order[start:stop]
        ids = torch.tensor([prompts[place] for place in places], device=model.device)
        with torch.inference_mode():
            out = model.causal_lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=greedy,
            )
        answers = out[:, length:].tolist()
        yield (
            places,
            [
                Sample(prompts[place], _until(answer, model.ends))
                for place, answer in zip(places, answers, strict=True)
            ],
        )
        start = stop


def _until(answer: list[int], ends: frozenset[int]) -> tuple[int, ...]:
    for index, token in enumerate(answer):
        if token in ends:
            return tuple(answer[: index + 1])
    return tuple(answer)


@contextmanager
def ablated(model: HFModel, skip: SkipSet, rows: Tensor) -> Iterator[None]:
    """Within, the sub-layers of a skip set add nothing to the residual stream of some tokens.

    Keys and values of those tokens are still there for others to attend. Where the tokens are all
    generated ones, nobody attends them: it is a request that skips while it decodes.

    Args:
        model: whose passes are changed.
        skip: attentions and MLPs; its phase is not read.
        rows: the tokens, bool, (rows, tokens).
    """

    def silence(_module: Any, _arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        silent = hidden.masked_fill(rows[..., None], 0.0)
        return (silent, *output[1:]) if isinstance(output, tuple) else silent

    named = [(layer, "self_attn") for layer in skip.attention]
    named += [(layer, "mlp") for layer in skip.mlp]
    handles = [
        model.blocks[layer].get_submodule(name).register_forward_hook(silence)
        for layer, name in named
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
