"""The slow plain reference of expert controls: transformers, with routers that choose otherwise.

No cache: every step runs the whole sequences again. What a token was routed to when it was the
newest is replayed in later steps. Sequences of unlike length are padded at the end, where no token
of theirs can see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sluice.models.policy.experts import Contrast, ExpertId, ExpertPolicy
from sluice.models.policy.policy import SkipSet

from .remixes import ReferenceStore, Remixer
from .routes import Asked, Route, Router, choice_scores, route, weak_route
from .streams import ATTENTION, MLP, ExpertRun, Row, Stream, shared_in_step


class ExpertReference:
    """A mixture-of-experts model in plain transformers, fp32."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        gates = {
            index: getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None)
            for index, layer in enumerate(self.model.model.layers)
        }
        self._gates = {index: gate for index, gate in gates.items() if gate is not None}
        self.layers = tuple(self._gates)
        self.routers = {index: _router(self.model, gate) for index, gate in self._gates.items()}
        self.experts: int = len(self._gates[self.layers[0]].weight)

    def run(
        self,
        prompt: Sequence[int],
        experts: ExpertPolicy,
        tokens: int,
        *,
        skip: SkipSet | None = None,
        super_experts: Collection[ExpertId] = (),
        references: Mapping[str, ReferenceStore] | None = None,
    ) -> ExpertRun:
        """Greedy continuation of `prompt`; see `run_together`."""
        skips = None if skip is None else [skip]
        return self.run_together(
            [prompt],
            [experts],
            tokens,
            skips=skips,
            super_experts=super_experts,
            references=references,
        )[0]

    @torch.no_grad()
    def run_together(
        self,
        prompts: Sequence[Sequence[int]],
        policies: Sequence[ExpertPolicy],
        tokens: int,
        *,
        skips: Sequence[SkipSet] | None = None,
        super_experts: Collection[ExpertId] = (),
        references: Mapping[str, ReferenceStore] | None = None,
    ) -> list[ExpertRun]:
        """Greedy continuations of requests whose prompts end in the same step.

        So the i-th generated tokens of all of them are the decode rows of one step, and share
        what budgets let them share.

        Args:
            prompts: token ids.
            policies: one for each prompt.
            tokens: how many to generate.
            skips: sub-layers that each request leaves out; none by default.
            super_experts: of the profile.
            references: of the profile, by name.
        """
        skips = skips or [SkipSet()] * len(prompts)
        strong: list[Stream] = []
        weak: list[Stream | None] = []
        for prompt, policy, skip in zip(prompts, policies, skips, strict=True):
            stream = Stream([*prompt], len(prompt), policy, skip, super_experts)
            stream.remixer = self._remixer(prompt, policy, references or {})
            strong.append(stream)
            shadow = None
            if policy.contrast is not None:
                assert policy == ExpertPolicy(contrast=policy.contrast, protect=policy.protect)
                shadow = Stream([*prompt], len(prompt), ExpertPolicy(), skip, ())
                shadow.weak_rank = policy.contrast.weak_rank
            weak.append(shadow)

        for _ in range(tokens):
            streams = strong + [stream for stream in weak if stream is not None]
            logits = dict(zip(map(id, streams), self._pass(streams), strict=True))
            for stream, shadow in zip(strong, weak, strict=True):
                final = logits[id(stream)]
                if shadow is not None:
                    assert stream.experts.contrast is not None
                    final = contrasted(final, logits[id(shadow)], stream.experts.contrast)
                    shadow.sequence.append(int(final.argmax()))
                stream.sequence.append(int(final.argmax()))
        return [
            stream.run(
                self.layers,
                self.experts,
                shadow and shadow.run(self.layers, self.experts, None),
            )
            for stream, shadow in zip(strong, weak, strict=True)
        ]

    def embedding(self, prompt: Sequence[int]) -> Tensor:
        """The model's own embedding of a prompt: the mean of its tokens' input embeddings."""
        table = self.model.get_input_embeddings().weight.detach()
        return table[list(prompt)].mean(dim=0)

    def _remixer(
        self,
        prompt: Sequence[int],
        policy: ExpertPolicy,
        references: Mapping[str, ReferenceStore],
    ) -> Remixer | None:
        if policy.remix is None:
            return None
        name = policy.remix.references
        store = None if name is None else references[name]
        return Remixer(policy.remix, store, self.embedding(prompt))

    def _pass(self, streams: list[Stream]) -> list[Tensor]:
        """Run all sequences; logits of each one's last position, (vocabulary,)."""
        length = max(len(stream.sequence) for stream in streams)
        padded = [stream.sequence + [0] * (length - len(stream.sequence)) for stream in streams]
        with self._hooks(streams, length):
            output = self.model(torch.tensor(padded), use_cache=False)
        return [output.logits[i, len(stream.sequence) - 1] for i, stream in enumerate(streams)]

    @contextmanager
    def _hooks(self, streams: list[Stream], length: int) -> Iterator[None]:
        def rerouted(layer: int) -> Callable[..., Any]:
            def hook(_module: Any, _inputs: Any, output: Any) -> Any:
                logits = output[0].view(len(streams), length, -1)
                self._route_new(layer, streams, logits)
                return (output[0], *self._dispatch(layer, streams, length))

            return hook

        def silence(layer: int, module: str) -> Callable[..., Any]:
            def hook(_module: Any, _inputs: Any, output: Any) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                for i, stream in enumerate(streams):
                    for position in range(len(stream.sequence)):
                        if stream.leaves_out(layer, module, position):
                            hidden[i, position] = 0.0
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        hooks = [gate.register_forward_hook(rerouted(layer)) for layer, gate in self._gates.items()]
        for i, layer in enumerate(self.model.model.layers):
            hooks.append(layer.self_attn.register_forward_hook(silence(i, ATTENTION)))
            hooks.append(layer.mlp.register_forward_hook(silence(i, MLP)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _route_new(self, layer: int, streams: list[Stream], logits: Tensor) -> None:
        """Route the tokens that the layer has not seen before."""
        router = self.routers[layer]
        rows = []
        for i, stream in enumerate(streams):
            for position in range(len(stream.sequence)):
                if (layer, position) in stream.routes:
                    continue
                if stream.leaves_out(layer, MLP, position):
                    stream.routes[layer, position] = Route({})
                    continue
                raw = router.scores(logits[i, position])
                stream.raw[layer, position] = raw
                if stream.weak_rank is not None:
                    weak = weak_route(raw.tolist(), router, stream.weak_rank)
                    stream.routes[layer, position] = weak
                    continue
                scores = stream.mixed(layer, position, raw.tolist())
                asked = Asked.of(stream.experts, layer, stream.super_experts)
                choice = choice_scores(scores, router, asked)
                rows.append(Row(stream, position, raw.tolist(), scores, asked, choice))

        shared = shared_in_step(rows)
        for row in rows:
            allowed = None if row.budget is None else shared[row.budget]
            row.stream.routes[layer, row.position] = route(
                row.raw, row.scores, router, row.asked, allowed
            )

    def _dispatch(self, layer: int, streams: list[Stream], length: int) -> tuple[Tensor, Tensor]:
        """Weights and experts, (rows, most experts of a row); weight 0 where a row has fewer."""
        rows = [
            stream.routes[layer, at].weights if at < len(stream.sequence) else {}
            for stream in streams
            for at in range(length)
        ]
        width = max(1, *map(len, rows))
        weights = torch.zeros(len(rows), width)
        experts = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            for j, (expert, weight) in enumerate(row.items()):
                weights[i, j], experts[i, j] = weight, expert
        return weights, experts


def contrasted(strong: Tensor, weak: Tensor, contrast: Contrast) -> Tensor:
    """SCMoE's logits from those of the two passes, (vocabulary,)."""
    combined = (1.0 + contrast.beta) * strong - contrast.beta * weak
    combined[strong < strong.max() + math.log(contrast.alpha)] = -math.inf
    return combined


def _router(model: Any, gate: Any) -> Router:
    config, top_k = model.config, gate.top_k
    match config.model_type:
        case "olmoe" | "qwen2_moe" | "qwen3_moe":
            return Router(top_k, renormalize=config.norm_topk_prob)
        case "mixtral" | "gpt_oss":
            return Router(top_k)
        case "deepseek_v2":
            limited = config.topk_method == "group_limited_greedy"
            return Router(
                top_k,
                renormalize=False,
                scale=config.routed_scaling_factor,
                groups=config.n_group if limited else 1,
                topk_group=config.topk_group if limited else 1,
            )
        case "deepseek_v3":
            return Router(
                top_k,
                sigmoid=True,
                renormalize=config.norm_topk_prob,
                scale=config.routed_scaling_factor,
                groups=config.n_group,
                topk_group=config.topk_group,
                correction=tuple(gate.e_score_correction_bias.tolist()),
            )
    raise ValueError(f"no router known for {config.model_type}")
