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
_SMALLEST = torch.finfo(torch.float32).tiny


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
        k: int64, (rows, 1): experts per row.
        most: largest entry of `k`, known without asking the device.
        uniform: all entries of `k` are `most`.
        bias: fp32, (rows, experts), added to selection scores; -inf masks. Or None.
        dropped: bool, (rows, experts): taken out of what was selected. Or None.
        forced: bool, (rows, experts): always selected. Or None.
        forced_weight: fp32, (rows, experts): NaN is the mean of the others. With `forced`.
        ratio: fp32, (rows, 1): least share of the first rank's score; 0 cuts nothing. Or None.
        top_p: fp32, (rows, 1): share of the score that the ranks before one may have; inf
            cuts nothing. Or None.
        protected: bool, (rows, experts): put back if the model's own router selects it. Or None.
    """

    k: torch.Tensor
    most: int
    uniform: bool = False
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
    *,
    starving: bool = False,
) -> Selection:
    """Top-k of `choice`, cut and weighed.

    Args:
        scores: fp32, (rows, experts), re-mixed if that is asked; what weights are made of.
        choice: from `selection_scores`, with a budget's outsiders at -inf.
        stock_choice: the same without any control; the same object if there is none.
        spec: the model's router.
        controls: of the rows.
        starving: a row may have fewer finite entries in `choice` than its k.
    """
    values, ids = _best(choice, controls.most)
    # Every operator costs as much as the arithmetic in it here, so none runs that is not asked.
    ranked = choice is scores
    slots = _Slots(ids, values if ranked else scores.gather(1, ids))
    if starving:
        slots.keep(values > _OUT)
    if not controls.uniform:
        slots.keep(torch.arange(ids.shape[1], device=ids.device) < controls.k)
    if controls.dropped is not None:
        slots.keep(~slots.look_up(controls.dropped))
    if controls.forced is not None:
        slots.forced = slots.look_up(controls.forced)
    if controls.ratio is not None:
        leads = ranked and controls.dropped is None
        first = slots.weights[:, :1] if leads else slots.held().amax(-1, keepdim=True)
        slots.cut(slots.weights >= controls.ratio * first)
    if controls.top_p is not None:
        most = controls.top_p
        if spec.scoring != "softmax":
            most = most * scores.sum(-1, keepdim=True)
        slots.cut(_before(slots.held(), ranked) <= most)
    changed = stock_choice is not choice or controls.dropped is not None
    taken = None
    if changed or controls.protected is not None or ids.shape[1] > spec.top_k:
        _, stock = _best(stock_choice, spec.top_k)
        missing = ~slots.holds(stock, scores.shape[1])
        if controls.protected is not None:
            back = controls.protected.expand(len(ids), -1).gather(1, stock) & missing
            slots.append(stock, scores.gather(1, stock), back)
            missing &= ~back
        taken = missing.sum(-1)
    if controls.forced is not None:
        slots.weigh_forced(controls)
    weights = slots.held()
    if spec.renormalize:
        if not ranked:
            # A mask may leave only experts whose scores are too small for fp32; they share alike.
            weights = weights.clamp(min=_SMALLEST)
            weights = weights if slots.kept is None else weights.masked_fill(~slots.kept, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    in_order = controls.dropped is None and controls.forced is None and controls.protected is None
    cuts = controls.ratio is not None or controls.top_p is not None
    weights, ids, active = slots.packed(weights, in_order and (ranked or not cuts))
    return Selection(weights, ids, active, spec.top_k - active if taken is None else taken)


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


def _best(choice: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest entries of each row and where they are, (rows, k); of equals the first.

    Not `topk`: which of equals it takes depends on `k`, and so a row's on its neighbours'.
    """
    values, ids = choice.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def _before(held: torch.Tensor, ranked: bool) -> torch.Tensor:
    """Sum of what better ranks hold, (rows, slots)."""
    if ranked:
        return held.cumsum(-1) - held
    values, order = held.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(held).scatter_(1, order, values.cumsum(-1) - values)


class _Slots:
    """Selected experts of rows, (rows, slots), and which of them are still in."""

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.ids = ids
        self.weights = weights
        self.kept: torch.Tensor | None = None
        self.forced: torch.Tensor | None = None

    def look_up(self, table: torch.Tensor) -> torch.Tensor:
        """Entries of the slots' experts. `table`: (rows or 1, experts)."""
        return table.expand(len(self.ids), -1).gather(1, self.ids)

    def keep(self, stays: torch.Tensor) -> None:
        """Only what also `stays` is still in."""
        self.kept = stays.expand_as(self.ids) if self.kept is None else self.kept & stays

    def cut(self, stays: torch.Tensor) -> None:
        """As `keep`, sparing forced experts."""
        self.keep(stays if self.forced is None else stays | self.forced)

    def held(self) -> torch.Tensor:
        """Weights, 0 for what is out."""
        return self.weights if self.kept is None else self.weights.masked_fill(~self.kept, 0.0)

    def holds(self, ids: torch.Tensor, experts: int) -> torch.Tensor:
        """Whether rows still have these experts in. `ids`: (rows, n)."""
        kept = torch.ones_like(self.ids, dtype=torch.bool) if self.kept is None else self.kept
        chosen = torch.zeros((len(ids), experts), dtype=torch.bool, device=ids.device)
        return chosen.scatter_(1, self.ids, kept).gather(1, ids)

    def append(self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor) -> None:
        """Add slots, (rows, n) each."""
        own = torch.ones_like(self.ids, dtype=torch.bool) if self.kept is None else self.kept
        self.kept = torch.cat([own, kept], 1)
        self.ids = torch.cat([self.ids, ids], 1)
        self.weights = torch.cat([self.weights, weights], 1)
        if self.forced is not None:
            self.forced = torch.cat([self.forced, torch.zeros_like(kept)], 1)

    def weigh_forced(self, controls: RowControls) -> None:
        """Give forced experts what they weigh in place of their scores."""
        assert self.forced is not None
        assert controls.forced_weight is not None
        given = self.look_up(controls.forced_weight)
        others = ~self.forced if self.kept is None else self.kept & ~self.forced
        count = others.sum(-1, keepdim=True)
        mean = self.weights.masked_fill(~others, 0.0).sum(-1, keepdim=True) / count
        # Where everything is forced there is no mean, and experts weigh what they scored.
        unasked = torch.where(count > 0, mean, self.weights)
        weights = torch.where(given.isnan(), unasked, given)
        self.weights = torch.where(self.forced, weights, self.weights)

    def packed(
        self, weights: torch.Tensor, in_order: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights, ids and number of what is in, no wider than the fullest row needs.

        Args:
            weights: final ones, (rows, slots).
            in_order: what is in comes before what is out.
        """
        ids, kept = self.ids, self.kept
        if kept is None:
            active = torch.full((len(ids),), ids.shape[1], device=ids.device)
            # vLLM's CPU kernel reads memory, not strides.
            return weights.contiguous(), ids.to(torch.int32).contiguous(), active
        if not in_order:
            order = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices
            kept, weights, ids = (part.gather(1, order) for part in (kept, weights, ids))
        active = kept.sum(-1)
        width = ids.shape[1]
        if ids.device.type == "cpu":
            # How many slots are used is data: on a GPU asking for it would wait for the device.
            used = active.numpy()
            if used.min() == width:
                return weights.contiguous(), ids.to(torch.int32).contiguous(), active
            width = int(used.max())
        kept, weights, ids = kept[:, :width], weights[:, :width], ids[:, :width]
        ids = torch.where(kept, ids, ids[:, :1]).to(torch.int32)
        return weights.contiguous(), ids, active
