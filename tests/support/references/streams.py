"""What one request of the expert reference asked and was given, token by token."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sluice.models.policy.experts import ExpertBudget, ExpertId, ExpertPolicy, RemixScope
from sluice.models.policy.policy import Phase, SkipSet

from .budgets import shared_experts
from .remixes import Remixer
from .routes import Asked, Route

ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class ExpertRun:
    """What one request did. Positions are all tokens that were fed: all but the last generated.

    Attributes:
        tokens: generated tokens.
        layers: decoder layers with routed experts.
        selected: per entry of `layers` and position, the final weight of each expert that ran;
            none where the layer was left out.
        scores: per entry of `layers`, what the router made of its logits, (positions, experts);
            zero where the layer was left out.
        margin: smallest distance of a score from the line that it was held against. A tiny one
            may fall the other way elsewhere. Budgets, references and tokens are not counted.
        weak: the weak pass of a contrast, or None.
    """

    tokens: list[int]
    layers: tuple[int, ...]
    selected: list[list[dict[int, float]]]
    scores: list[Tensor]
    margin: float
    weak: ExpertRun | None = None


@dataclass
class Stream:
    """A sequence on its way through the model."""

    sequence: list[int]
    prompt: int
    experts: ExpertPolicy
    skip: SkipSet
    super_experts: Collection[ExpertId]
    remixer: Remixer | None = None
    weak_rank: int | None = None
    routes: dict[tuple[int, int], Route] = field(default_factory=dict)
    raw: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def leaves_out(self, layer: int, module: str, position: int) -> bool:
        """Whether a depth control takes the sub-layer from a position."""
        layers = self.skip.attention if module == ATTENTION else self.skip.mlp
        phase = Phase.PREFILL if position < self.prompt else Phase.DECODE
        return layer in layers and self.skip.phase in (phase, Phase.BOTH)

    def mixed(self, layer: int, position: int, scores: list[float]) -> list[float]:
        """Scores of a row after re-mixing."""
        if self.remixer is None or position < self.prompt - 1:
            return scores
        if self.remixer.remix.scope is RemixScope.LAST and position >= self.prompt:
            return scores
        return self.remixer.remixed(layer, scores)

    def run(self, layers: tuple[int, ...], experts: int, weak: ExpertRun | None) -> ExpertRun:
        """What became of it."""
        fed = range(len(self.sequence) - 1)
        nothing = torch.zeros(experts)
        return ExpertRun(
            tokens=self.sequence[self.prompt :],
            layers=layers,
            selected=[[self.routes[layer, at].weights for at in fed] for layer in layers],
            scores=[
                torch.stack([self.raw.get((layer, at), nothing) for at in fed]) for layer in layers
            ],
            margin=min((each.margin for each in self.routes.values()), default=math.inf),
            weak=weak,
        )


@dataclass(frozen=True)
class Row:
    """A token that a layer has yet to route."""

    stream: Stream
    position: int
    raw: list[float]
    scores: list[float]
    asked: Asked
    choice: list[float]

    @property
    def budget(self) -> ExpertBudget | None:
        """That binds the row: decode rows only."""
        return self.stream.experts.budget if self.position >= self.stream.prompt else None


def shared_in_step(rows: list[Row]) -> dict[ExpertBudget, frozenset[int]]:
    """What the decode rows of each budget share."""
    groups: dict[ExpertBudget, list[Row]] = {}
    for row in rows:
        if row.budget is not None:
            groups.setdefault(row.budget, []).append(row)
    return {
        budget: shared_experts(budget, [row.scores for row in group], [row.choice for row in group])
        for budget, group in groups.items()
    }
