"""The slow plain reference: transformers, with skipped sub-layers silenced by hooks.

No cache: every step runs the whole sequence again, and a hook zeroes a sub-layer's output at the
positions that skip it. A token that skips attention still gives K/V to later tokens from the
hidden state that passed the layer by, which is exactly what K/V filling promises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from sluice.models.policy import Phase, SkipSet


class Reference:
    """A model in plain transformers, fp32."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], skip: SkipSet, tokens: int) -> list[int]:
        """Greedy continuation of `prompt` under `skip`."""
        sequence = list(prompt)
        for _ in range(tokens):
            with self._silenced(skip, len(prompt), len(sequence)):
                logits = self.model(torch.tensor([sequence]), use_cache=False).logits
            sequence.append(int(logits[0, -1].argmax()))
        return sequence[len(prompt) :]

    @contextmanager
    def _silenced(self, skip: SkipSet, prompt: int, length: int) -> Iterator[None]:
        skipping = torch.zeros(length, dtype=torch.bool)
        skipping[:prompt] = skip.phase in (Phase.PREFILL, Phase.BOTH)
        skipping[prompt:] = skip.phase in (Phase.DECODE, Phase.BOTH)

        def silence(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, skipping] = 0.0
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        layers = self.model.model.layers
        hooks = [layers[i].self_attn.register_forward_hook(silence) for i in skip.attention] + [
            layers[i].mlp.register_forward_hook(silence) for i in skip.mlp
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
