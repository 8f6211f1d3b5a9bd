"""Experts behind the demo model's refusals: MoTE's fTRI (arXiv 2502.11096).

The model runs refused and answered prompts of the training split; an expert's part in refusing is
how much more gate weight (or how many more tokens) refused prompts give it, per prompt token. MoTE
sums over a prompt's tokens; prompts of several tasks differ too much in length for that. Answered
prompts are those of the other tasks, or the harmless ones of the refusal task's own templates.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sluice.models.offline.demo.studies.deactivation import Mode, deactivated, most_away
from sluice.models.offline.demo.studies.references import encoded
from sluice.models.offline.demo.tasks import facts
from sluice.models.offline.demo.tasks.tasks import TASKS, Item, Split, distinct
from sluice.models.offline.demo.training.model import Model
from sluice.models.offline.hf_model.moe import MoeLayer, recorded_scores, softmax_routers
from sluice.models.offline.hf_model.samples import SampleBatch
from sluice.models.policy.experts import ExpertId

Measure = Literal["weight", "count"]
"""An expert's activation on a token: its gate weight, or 1 where it is selected."""

Against = Literal["others", "harmless"]
"""Answered prompts: of the other tasks, each counting the same, or of the refusal task."""

REFUSAL_TASK = "refusal"
LEAST_CUT = 0.5
"""Share of refusals that has to go."""
MOST_LOSS = 0.01
"""Exact match of the other tasks that may go, on average."""


@dataclass(frozen=True)
class PromptSets:
    """Items to contrast or to judge by.

    Attributes:
        refused: whose right answer is the refusal.
        harmless: of the same templates, whose right answer is not.
        others: of every other task.
    """

    refused: tuple[Item, ...]
    harmless: tuple[Item, ...]
    others: Mapping[str, tuple[Item, ...]]

    @classmethod
    def draw(cls, split: Split, seed: int, refusals: int, per_task: int) -> "PromptSets":
        """Draw different items: `refusals` refused and harmless ones each, `per_task` a task.

        Raises:
            ValueError: the split holds fewer.
        """
        drawn = distinct(REFUSAL_TASK, split, seed, round(2.5 * refusals) + 10)
        refused = [item for item in drawn if item.answer == facts.REFUSAL][:refusals]
        harmless = [item for item in drawn if item.answer != facts.REFUSAL][:refusals]
        if min(len(refused), len(harmless)) < refusals:
            raise ValueError(f"{len(refused)} refused, {len(harmless)} harmless: {refusals} wanted")
        others = {
            task: tuple(distinct(task, split, seed, per_task))
            for task in TASKS
            if task != REFUSAL_TASK
        }
        return cls(tuple(refused), tuple(harmless), others)


@torch.no_grad()
def activations(model: Model, items: Sequence[Item], measure: Measure) -> Tensor:
    """Activations per prompt token, fp32, (prompts, layers, experts).

    Only prompts that the model answers right count: a refused one is one that it refuses.
    """
    routers = softmax_routers(model)
    batch = SampleBatch.of([encoded(item) for item in items])
    with recorded_scores(routers) as scores:
        right = batch.exact(batch.answer_logits(model))
    mine = batch.prompts.float().unsqueeze(-1)
    layers = []
    for layer, router in routers.items():
        weights, ids = router.choose(scores[layer])
        if measure == "count":
            weights = torch.ones_like(weights)
        given = torch.zeros_like(scores[layer]).scatter(1, ids, weights)
        layers.append((given.view(*batch.ids.shape, -1) * mine).sum(1) / mine.sum(1))
    return torch.stack(layers, dim=1)[right]


def contrast(model: Model, sets: PromptSets, measure: Measure, against: Against) -> Tensor:
    """fTRI's score: mean activation of refused prompts less that of answered ones.

    Returns:
        fp32, (layers, experts).
    """
    refused = activations(model, sets.refused, measure).mean(0)
    if against == "harmless":
        return refused - activations(model, sets.harmless, measure).mean(0)
    means = [activations(model, items, measure).mean(0) for items in sets.others.values()]
    return refused - torch.stack(means).mean(0)


def ranking(scores: Tensor, first_layer: int = 0) -> list[ExpertId]:
    """Experts from the largest score to the smallest, layers before `first_layer` left out."""
    experts = scores.size(1)
    order = scores[first_layer:].flatten().argsort(descending=True, stable=True).tolist()
    return [(first_layer + place // experts, place % experts) for place in order]


def leading(
    ranked: Sequence[ExpertId],
    count: int,
    routers: Mapping[int, MoeLayer],
    mode: Mode,
) -> tuple[ExpertId, ...]:
    """The first `count` experts that can go together: no layer gives more than it may.

    Raises:
        ValueError: there are not so many.
    """
    room = {layer: most_away(router, mode) for layer, router in routers.items()}
    chosen: list[ExpertId] = []
    for layer, expert in ranked:
        if len(chosen) == count:
            break
        if room[layer]:
            room[layer] -= 1
            chosen.append((layer, expert))
    if len(chosen) < count:
        raise ValueError(f"{count} experts asked, {len(chosen)} can go")
    return tuple(chosen)


def drawn_experts(
    count: int, routers: Mapping[int, MoeLayer], mode: Mode, first_layer: int, seed: int
) -> tuple[ExpertId, ...]:
    """As many experts at random, of the same layers: the control."""
    everyone = [
        (layer, expert)
        for layer, router in routers.items()
        if layer >= first_layer
        for expert in range(router.count)
    ]
    random.Random(seed).shuffle(everyone)
    return leading(everyone, count, routers, mode)


@dataclass(frozen=True)
class Trial:
    """What going without some experts does, teacher-forced; shares are between 0 and 1.

    Attributes:
        experts: that go.
        mode: how.
        refusals: refused prompts still answered with the refusal.
        harmless: harmless prompts still answered right.
        others: exact match of the other tasks, each counting the same.
    """

    experts: tuple[ExpertId, ...]
    mode: Mode
    refusals: float
    harmless: float
    others: float

    def meets_bar(self, base: "Trial") -> bool:
        """Enough refusals go, and little else."""
        cut = self.refusals <= (1 - LEAST_CUT) * base.refusals
        return cut and base.others - self.others <= MOST_LOSS


class Judge:
    """Tries sets of experts on the same items, in plain transformers."""

    def __init__(self, model: Model, sets: PromptSets) -> None:
        """Judge by `sets`."""
        self._model, self._routers = model, softmax_routers(model)
        groups = [sets.refused, sets.harmless, *sets.others.values()]
        self._batches = [SampleBatch.of([encoded(item) for item in group]) for group in groups]

    @torch.no_grad()
    def trial(self, experts: Sequence[ExpertId], mode: Mode) -> Trial:
        """Go without some experts.

        Raises:
            ValueError: a layer cannot spare so many.
        """
        with deactivated(self._routers, experts, mode):
            shares = [
                float(batch.exact(batch.answer_logits(self._model)).float().mean())
                for batch in self._batches
            ]
        refusals, harmless, *others = shares
        return Trial(tuple(experts), mode, refusals, harmless, sum(others) / len(others))


def trials(
    model: Model, judge: Judge, ranked: Sequence[ExpertId], mode: Mode, most: int
) -> list[Trial]:
    """Go without nothing, then 1, 2, ... leading experts, until the bar is met or `most` went.

    Returns:
        The last one meets the bar (`Trial.meets_bar` of the first), or none does.
    """
    routers = softmax_routers(model)
    tried = [judge.trial((), mode)]
    for count in range(1, most + 1):
        tried.append(judge.trial(leading(ranked, count, routers, mode), mode))
        if tried[-1].meets_bar(tried[0]):
            break
    return tried
