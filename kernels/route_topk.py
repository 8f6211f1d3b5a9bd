"""Router logits to selected experts and weights, under per-row controls.

Plain PyTorch; also the CPU path. The order within a layer is that of design section 6: scores,
re-mix, selection bias and mask, group limit, batch budget, top-k, drop, ratio, top-p, protection,
weights. Re-mix and budget come from outside, between `score` and `select`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_OUT = float("-inf")
_FIRST = float("inf")


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a model's own router selects.

    Attributes:
        top_k: experts per token.
        scoring: `softmax` or `sigmoid`.
        renormalize: selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups, 1 for none; group-limited selection as in DeepSeek-V2 and -V3.
        topk_group: groups that a row may choose from.
        correction: fp32, (experts,), added to selection scores only, or None.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_group: int = 1
    correction: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowControls:
    """Controls of some rows; leading dimension is the rows, or 1 for all alike.

    Attributes:
        k: int64, (rows,): experts per row.
        most: largest entry of `k`, known without asking the device.
        bias: fp32, (rows, experts), added to selection scores; -inf masks. Or None.
        dropped: bool, (rows, experts): taken out of what was selected. Or None.
        forced: bool, (rows, experts): always selected. Or None.
        forced_weight: fp32, (rows, experts): NaN is the mean of the others. With `forced`.
        ratio: fp32, (rows,): least share of the first rank's score; 0 cuts nothing. Or None.
        top_p: fp32, (rows,): share of the score that the ranks before one may have; 1 cuts
            nothing. Or None.
        protected: bool, (rows, experts): put back if the model's own router selects it. Or None.
    """

    k: torch.Tensor
    most: int
    bias: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
    forced: torch.Tensor | None = None
    forced_weight: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    protected: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What rows dispatch to.

    Attributes:
        weights: fp32, (rows, width); 0 in unused slots.
        ids: int32, (rows, width); an unused slot repeats the row's first expert.
        active: int64, (rows,): experts that really run.
        taken: int64, (rows,): selections of the model's own router that are not among them.
    """

    weights: torch.Tensor
    ids: torch.Tensor
    active: torch.Tensor
    taken: torch.Tensor


def score(logits: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Scores of the experts, fp32, (rows, experts). `logits`: (rows, experts), any dtype."""
    logits = logits.float()
    return logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()


def selection_scores(
    scores: torch.Tensor, spec: RouterSpec, controls: RowControls | None = None
) -> torch.Tensor:
    """What top-k runs on: corrected, biased, masked and limited to groups.

    Args:
        scores: from `score`, (rows, experts).
        spec: the model's router.
        controls: of the rows; None is the model's own choice.

    Returns:
        fp32, (rows, experts); +inf for forced experts, -inf for those out of reach.
    """
    choice = scores if spec.correction is None else scores + spec.correction
    forced = None
    if controls is not None:
        forced = controls.forced
        if controls.bias is not None:
            choice = choice + controls.bias
    if spec.groups > 1:
        choice = _within_groups(choice, spec, forced)
    if forced is not None:
        choice = choice.masked_fill(forced, _FIRST)
    return choice


def _within_groups(
    choice: torch.Tensor, spec: RouterSpec, forced: torch.Tensor | None
) -> torch.Tensor:
    grouped = choice.view(len(choice), spec.groups, -1)
    # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
    counted = 1 if spec.correction is None else 2
    groups = grouped.topk(counted, dim=-1).values.sum(-1)
    if forced is not None:
        own = forced.view(len(forced), spec.groups, -1).any(-1)
        groups = groups.masked_fill(own, _FIRST)
    inside = torch.zeros_like(groups, dtype=torch.bool)
    inside.scatter_(1, groups.topk(spec.topk_group, dim=-1).indices, True)
    return grouped.masked_fill(~inside.unsqueeze(-1), _OUT).view_as(choice)


def select(
    scores: torch.Tensor,
    choice: torch.Tensor,
    stock_choice: torch.Tensor,
    spec: RouterSpec,
    controls: RowControls,
) -> Selection:
    """Top-k of `choice`, cut and weighed.

    Args:
        scores: fp32, (rows, experts), re-mixed if that is asked; what weights are made of.
        choice: from `selection_scores`, with a budget's outsiders at -inf.
        stock_choice: the same without any control.
        spec: the model's router.
        controls: of the rows.
    """
    values, ids = choice.topk(min(controls.most, choice.shape[1]), dim=-1)
    if stock_choice is choice and ids.shape[1] >= spec.top_k:
        stock = ids[:, : spec.top_k]
    else:
        stock = stock_choice.topk(spec.top_k, dim=-1).indices
    kept = values > _OUT
    kept &= torch.arange(ids.shape[1], device=ids.device) < controls.k.unsqueeze(-1)
    held = scores.gather(1, ids)
    rows = len(scores)
    if controls.dropped is not None:
        kept &= ~controls.dropped.expand(rows, -1).gather(1, ids)
    forced = None
    if controls.forced is not None:
        forced = controls.forced.expand(rows, -1).gather(1, ids) & kept
    if controls.ratio is not None:
        first = held.masked_fill(~kept, 0.0).amax(-1, keepdim=True)
        kept &= _or_forced(held >= controls.ratio.unsqueeze(-1) * first, forced)
    if controls.top_p is not None:
        kept &= _or_forced(_in_top_p(held, kept, scores, controls.top_p), forced)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, kept)
    present = chosen.gather(1, stock)
    if controls.protected is not None:
        back = controls.protected.expand(rows, -1).gather(1, stock) & ~present
        present = present | back
        ids, kept = torch.cat([ids, stock], 1), torch.cat([kept, back], 1)
        held = scores.gather(1, ids)
        if forced is not None:
            forced = torch.cat([forced, torch.zeros_like(back)], 1)
    if forced is not None:
        held = _forced_weights(held, ids, kept, forced, controls)
    weights = held.masked_fill(~kept, 0.0)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    weights, ids, active = _packed(weights, ids, kept)
    return Selection(weights, ids, active, (~present).sum(-1))


def select_rank(choice: torch.Tensor, ranks: torch.Tensor, spec: RouterSpec) -> Selection:
    """One expert per row, by its rank in `choice`, with weight 1 (SCMoE's weak pass).

    Args:
        choice: from `selection_scores`, (rows, experts).
        ranks: int64, (rows,), from 0.
        spec: the model's router.
    """
    ranked = choice.sort(dim=-1, descending=True, stable=True).indices
    ids = ranked.gather(1, ranks.unsqueeze(-1))
    weights = torch.full_like(ids, 1, dtype=torch.float32) * spec.scale
    taken = (ranked[:, : spec.top_k] != ids).sum(-1)
    return Selection(weights, ids.to(torch.int32), torch.ones_like(ranks), taken)


def _or_forced(stays: torch.Tensor, forced: torch.Tensor | None) -> torch.Tensor:
    return stays if forced is None else stays | forced


def _in_top_p(
    held: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Slots whose better ranks have at most `top_p` of the row's whole score."""
    own = held.masked_fill(~kept, 0.0)
    ranked, order = own.sort(dim=-1, descending=True, stable=True)
    before = torch.empty_like(own).scatter_(1, order, ranked.cumsum(-1) - ranked)
    return before <= top_p.unsqueeze(-1) * scores.sum(-1, keepdim=True)


def _forced_weights(
    held: torch.Tensor,
    ids: torch.Tensor,
    kept: torch.Tensor,
    forced: torch.Tensor,
    controls: RowControls,
) -> torch.Tensor:
    """Scores with what forced experts weigh in their place."""
    assert controls.forced_weight is not None
    given = controls.forced_weight.expand(len(ids), -1).gather(1, ids)
    others = kept & ~forced
    count = others.sum(-1, keepdim=True)
    mean = held.masked_fill(~others, 0.0).sum(-1, keepdim=True) / count
    # Where everything is forced there is no mean, and experts weigh what they scored.
    unasked = torch.where(count > 0, mean.expand_as(held), held)
    return torch.where(forced, torch.where(given.isnan(), unasked, given), held)


def _packed(
    weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kept slots first, and no more slots than the fullest row needs."""
    order = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices
    kept = kept.gather(1, order)
    weights, ids = weights.gather(1, order), ids.gather(1, order)
    active = kept.sum(-1)
    # The number of slots is data: on a GPU asking for it would wait for the device.
    width = int(active.max()) if ids.device.type == "cpu" else ids.shape[1]
    kept, weights, ids = kept[:, :width], weights[:, :width], ids[:, :width]
    ids = torch.where(kept, ids, ids[:, :1])
    return weights.contiguous(), ids.to(torch.int32).contiguous(), active
