"""The slow plain reference: transformers, with hooks that silence what a position does not run.

No cache: every step runs the whole sequence again, and a hook zeroes a sub-layer's output at the
positions that skip it. A token that skips attention still gives K/V to later tokens from the
hidden state that passed the layer by, which is exactly what K/V filling promises. What a position
decided when it was the newest is replayed in later steps; only the newest decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from support.references.exits import ExitTest, pays
from support.references.prompts import first_probability, lac_ranges, mean_cosines
from support.references.watches import (
    ExitWatch,
    FirstWatch,
    ModWatch,
    PoolWatch,
    States,
    VoidWatch,
    Watch,
)
from torch import Tensor

from sluice.models.policy.policy import ExitRule, MissingKV, Phase, RoutingPolicy, SkipSet

ATTENTION, MLP = 0, 1


@dataclass(frozen=True)
class Run:
    """What one request did. A decode row is a generated token that was fed back: all but the last.

    Attributes:
        tokens: generated tokens.
        ran: bool, (positions fed, layers, 2 modules): what each position ran when it was live. A
            layer that `lac` finds void in `readout` or `replace` has run.
        left: per decode row, the exit layer after which it left, or None.
        mask: blocks that the prompt decided to leave out of generated tokens, or None.
        void: bool, (positions fed, layers), for `lac` in `readout` and `replace`, or None.
        keys: per layer, (kv_heads, positions fed, head_dim), after k-norm and RoPE. Positions that
            nobody attends (attention skipped in both phases) hold the projection all the same.
        values: as `keys`.
        margin: smallest distance of a statistic from the threshold it was held against (of the two
            best logits, for `patience`). A tiny one may fall the other way elsewhere. `mod` and
            the choice of tokens are not counted.
    """

    tokens: list[int]
    ran: Tensor
    left: list[int | None]
    mask: frozenset[int] | None
    void: Tensor | None
    keys: list[Tensor]
    values: list[Tensor]
    margin: float

    @property
    def exits(self) -> list[int]:
        """Per decode row, the last layer of which any sub-layer ran; -1 if none did."""
        layers = self.ran.shape[1]
        rows = self._decode_rows().any(dim=-1)
        return [max((i for i in range(layers) if row[i]), default=-1) for row in rows]

    @property
    def skipped(self) -> list[frozenset[int]]:
        """Per decode row, blocks of which nothing ran."""
        layers = self.ran.shape[1]
        rows = self._decode_rows().any(dim=-1)
        return [frozenset(i for i in range(layers) if not row[i]) for row in rows]

    def _decode_rows(self) -> Tensor:
        return self.ran[len(self.ran) - len(self.left) :]


class Reference:
    """A model in plain transformers, fp32."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self._layers = len(self.model.model.layers)
        self._adapters: Mapping[int, tuple[Tensor, Tensor]] = {}

    def greedy(self, prompt: Sequence[int], skip: SkipSet, tokens: int) -> list[int]:
        """Greedy continuation of `prompt` under `skip`."""
        return self.run(prompt, RoutingPolicy(skip), tokens).tokens

    @torch.no_grad()
    def run(
        self,
        prompt: Sequence[int],
        policy: RoutingPolicy,
        tokens: int,
        heads: Mapping[str, Tensor] | None = None,
        max_tokens: int | None = None,
        *,
        pending_limit: int = 8,
        block_size: int = 32,
        adapters: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Run:
        """Greedy continuation of `prompt` under `policy`.

        Args:
            prompt: token ids.
            policy: its `elastic` sets act like plain ones.
            tokens: how many to generate.
            heads: trained tensors named `<method>.<tensor>`.
            max_tokens: of the request, for the decay of a threshold; `tokens` by default.
            pending_limit: with `recompute`, the token after so many early exits without a full
                pass between them is not tested.
            block_size: with `recompute`, a token last in its K/V block is not tested.
            adapters: `down` and `up` by the layer after which they act on tokens that skip.
        """
        self._adapters = adapters or {}
        heads = heads or {}
        # `lasting` is what later tokens attend: the same as what ran, or with `recompute` deeper.
        lasting = self._static(policy.skip, len(prompt), len(prompt) + tokens - 1)
        watch = self._prompt_watch(policy, heads)
        logits, _ = self._pass(prompt, lasting[: len(prompt)], watch)
        mask = frozenset(watch.mask) if isinstance(watch, FirstWatch | PoolWatch) else None
        lasting[len(prompt) :, sorted(mask or ())] = False
        margin = watch.margin

        ran = lasting.clone()
        recompute = policy.exit is not None and policy.exit.kv is MissingKV.RECOMPUTE
        sequence, left, pending = [*prompt, int(logits.argmax())], [], 0
        gains: list[float | None] = []
        for index in range(tokens - 1):
            position = len(sequence) - 1
            full = recompute and (
                pending == pending_limit or position % block_size == block_size - 1
            )
            if policy.exit is not None and policy.exit.sparing:
                full = full or not pays(gains)
            watch = self._decode_watch(policy, heads, index, max_tokens or tokens, full)
            now = lasting[: len(sequence)].clone()
            logits, _ = self._pass(sequence, now, watch)
            margin = min(margin, watch.margin)
            left.append(watch.left if isinstance(watch, ExitWatch) else None)
            if policy.exit is not None and policy.exit.sparing:
                gains.append(None if full else self._gain(policy.exit, left[-1]))
            pending = 0 if left[-1] is None else pending + 1
            ran[position] = now[position]
            if not recompute:
                lasting[position] = now[position]
            sequence.append(int(logits.argmax()))

        watch = self._decode_watch(policy, heads, 0, 1, full=True)
        _, cache = self._pass(sequence[:-1], lasting, watch)
        return Run(
            tokens=sequence[len(prompt) :],
            ran=ran,
            left=left,
            mask=mask,
            void=torch.stack(watch.voids, dim=1) if isinstance(watch, VoidWatch) else None,
            keys=[layer.keys[0] for layer in cache.layers],
            values=[layer.values[0] for layer in cache.layers],
            margin=margin,
        )

    @torch.no_grad()
    def scores(
        self,
        prompt: Sequence[int],
        method: str,
        layers: Sequence[int],
        tokens: int,
        heads: Mapping[str, Tensor] | None = None,
    ) -> list[float]:
        """What an exit method sees in greedy decoding at full depth.

        One number per decode row and exit layer, rows outermost; `patience` gives how often in a
        row the exits agreed, `q_exit` the exit probability spent so far.
        """
        sequence = [*prompt, *self.run(prompt, RoutingPolicy(), tokens).tokens[:-1]]
        states = self.states(sequence)
        seen = []
        for position in range(len(prompt), len(sequence)):
            test = ExitTest(ExitRule(method, tuple(layers)), self._head, heads or {}, 0, 1)
            seen += [
                test.score(states[layer, position], states[layer + 1, position])
                for layer in sorted(layers)
            ]
        return seen

    @torch.no_grad()
    def prompt_scores(
        self, prompt: Sequence[int], method: str, heads: Mapping[str, Tensor] | None = None
    ) -> list[float]:
        """What a prompt method holds against its threshold, one number a layer, at full depth.

        For `lac` the threshold above which the layer is void for the last token; infinite where no
        threshold makes it so, minus infinite where every one does.
        """
        states = self.states(prompt)
        if method == "first":
            return [first_probability(i, states[i], heads or {}) for i in range(self._layers)]
        if method == "similarity":
            return mean_cosines(states)
        assert method == "lac"
        return [
            change / reach if reach else math.copysign(math.inf, change)
            for change, reach in lac_ranges(states)
        ]

    @torch.no_grad()
    def states(self, sequence: Sequence[int]) -> Tensor:
        """Residual stream at full depth, (layers + 1, positions, hidden), the embeddings first."""
        states = States()
        self._pass(sequence, self._static(SkipSet(), len(sequence), len(sequence)), states)
        return states.states

    def _prompt_watch(self, policy: RoutingPolicy, heads: Mapping[str, Tensor]) -> Watch:
        rule = policy.adaptive
        if rule is None:
            return Watch()
        assert policy.exit is None
        assert policy.skip.empty
        match (rule.method, rule.get("mode")):
            case ("first", _):
                return FirstWatch(rule, heads)
            case ("similarity", _) | ("lac", "predict"):
                return PoolWatch(rule)
            case ("lac", "readout" | "replace"):
                return VoidWatch(rule, self._layers)
            case ("mod", _):
                return ModWatch(rule, self._layers)
        raise ValueError(f"unknown adaptive rule {rule}")

    def _decode_watch(
        self,
        policy: RoutingPolicy,
        heads: Mapping[str, Tensor],
        index: int,
        limit: int,
        full: bool,
    ) -> Watch:
        if policy.exit is not None and not full:
            test = ExitTest(policy.exit, self._head, heads, index, limit)
            return ExitWatch(policy.exit, test)
        if policy.adaptive is not None and policy.adaptive.get("mode") in ("readout", "replace"):
            return VoidWatch(policy.adaptive, self._layers)
        return Watch()

    def _gain(self, rule: ExitRule, left: int | None) -> float:
        """Layers that a tested token left out, less the LM heads of its tests; in LM heads."""
        layers = rule.layers
        if left is None:
            return -float(len(layers))
        saved = 0
        for layer in self.model.model.layers[left + 1 :]:
            attention = layer.self_attn
            filled = (attention.k_proj, attention.v_proj)
            saved += sum(each.numel() for name, each in layer.named_parameters() if each.dim() == 2)
            saved -= sum(each.weight.numel() for each in filled)
        tests = sum(layer <= left for layer in layers)
        return saved / self.model.lm_head.weight.numel() - tests

    def _static(self, skip: SkipSet, prompt: int, length: int) -> Tensor:
        skipping = torch.zeros(length, dtype=torch.bool)
        skipping[:prompt] = skip.phase in (Phase.PREFILL, Phase.BOTH)
        skipping[prompt:] = skip.phase in (Phase.DECODE, Phase.BOTH)
        ran = torch.ones(length, self._layers, 2, dtype=torch.bool)
        for layers, module in ((skip.attention, ATTENTION), (skip.mlp, MLP)):
            for layer in layers:
                ran[skipping, layer, module] = False
        return ran

    def _head(self, state: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(state))
        return logits

    def _pass(self, sequence: Sequence[int], ran: Tensor, watch: Watch) -> tuple[Tensor, Any]:
        """Run a sequence; logits of the last position, and the cache of all of them."""
        # Without a config no layer of the cache forgets what slid out of its window.
        cache = transformers.DynamicCache()
        with self._hooks(ran, watch):
            output = self.model(torch.tensor([sequence]), past_key_values=cache, use_cache=True)
        return output.logits[0, -1], cache

    @contextmanager
    def _hooks(self, ran: Tensor, watch: Watch) -> Iterator[None]:
        def silence(layer: int, module: int) -> Callable[..., Any]:
            def hook(_module: Any, _inputs: Any, output: Any) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                hidden[0, ~ran[:, layer, module]] = 0.0
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        def enter(layer: int) -> Callable[..., None]:
            return lambda _module, inputs: watch.entered(layer, inputs[0][0], ran)

        def leave(layer: int) -> Callable[..., Tensor]:
            def hook(_module: Any, inputs: Any, output: Tensor) -> Tensor:
                after = output[0]
                if layer in self._adapters:
                    down, up = self._adapters[layer]
                    size = (after.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                    skipping = ~ran.all(-1).all(-1)
                    after = after + skipping[:, None] * (after / size @ down.T @ up.T)
                return watch.passed(layer, inputs[0][0], after, ran)[None]

            return hook

        hooks = []
        for i, layer in enumerate(self.model.model.layers):
            hooks += [
                layer.register_forward_pre_hook(enter(i)),
                layer.self_attn.register_forward_hook(silence(i, ATTENTION)),
                layer.mlp.register_forward_hook(silence(i, MLP)),
                layer.register_forward_hook(leave(i)),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
