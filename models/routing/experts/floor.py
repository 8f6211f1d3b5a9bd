"""Enough experts stay: what deactivated and forced experts leave of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import BudgetMethod, ExpertBudget, ExpertId, ExpertPolicy
from sluice.models.routing.checks import invalid
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts.named import ACTIVATE, DEACTIVATE, first_entry
from sluice.models.routing.schema import NamedExperts


def check_floor(
    policy: ExpertPolicy,
    wanted: Mapping[int, int],
    shape: ExpertShape,
    deactivate: Sequence[NamedExperts],
    activate: Sequence[NamedExperts],
) -> None:
    """Every token finds as many experts as it wants and keeps one, in every layer.

    Args:
        policy: its masked, dropped and forced experts and its budget.
        wanted: experts per token by layer.
        shape: of the model's experts.
        deactivate: what the client wrote, to name the entry.
        activate: likewise.

    Raises:
        RoutingError: names the first entry of the layer where that does not hold.
    """
    forced = _by_layer((layer, expert) for layer, expert, _ in policy.forced)
    for layer, experts in forced.items():
        problem = forced_problem(experts, wanted[layer], shape)
        if problem is not None:
            raise invalid(f"layer {layer}: {problem}", first_entry(activate, layer, ACTIVATE))
    for layer, experts in _by_layer(policy.masked).items():
        problem = mask_problem(experts, forced.get(layer, ()), wanted[layer], shape)
        if problem is not None:
            raise _too_few(f"layer {layer}: {problem}", first_entry(deactivate, layer, DEACTIVATE))
    for layer, experts in _by_layer(policy.dropped).items():
        sure = _sure_of(policy.budget, wanted[layer])
        if len(experts) >= sure:
            raise _too_few(
                f"layer {layer}: a token is sure of {sure} experts, and {len(experts)} are "
                f"dropped: {sure - 1} may be at most",
                first_entry(deactivate, layer, DEACTIVATE),
            )


def forced_problem(forced: Collection[int], wanted: int, shape: ExpertShape) -> str | None:
    """Why a layer cannot force these experts, or None if it can."""
    if len(forced) > wanted:
        return f"{len(forced)} experts are activated, and a token has {wanted}"
    groups = len(_groups(forced, shape))
    if groups > shape.topk_group:
        return f"the activated experts are of {groups} groups, and a token has {shape.topk_group}"
    return None


def mask_problem(
    masked: Collection[int], forced: Collection[int], wanted: int, shape: ExpertShape
) -> str | None:
    """Why a token may not find `wanted` experts in a layer, or None if it always does.

    Where selection is limited by group, a token takes the groups of the forced experts, then the
    best of those with a score: one expert that is left makes one, or two under a correction bias.
    In the worst case the best groups are those with the fewest experts left.

    Args:
        masked: experts out of the selection.
        forced: experts always selected, none of them masked.
        wanted: experts per token.
        shape: of the model's experts.
    """
    size = shape.experts // shape.groups
    left = [size] * shape.groups
    for expert in masked:
        left[expert // size] -= 1
    forced_groups = _groups(forced, shape)
    least = 2 if shape.groups > 1 and shape.corrected else 1
    others = sorted(
        left[g] for g in range(shape.groups) if g not in forced_groups and left[g] >= least
    )
    usable = len(forced_groups) + len(others)
    if usable < shape.topk_group:
        return (
            f"{usable} groups are left with {least} experts or more, "
            f"and a token needs {shape.topk_group}"
        )
    reachable = sum(left[g] for g in forced_groups)
    reachable += sum(others[: shape.topk_group - len(forced_groups)])
    if reachable < wanted:
        return f"a token may find only {reachable} experts, and needs {wanted}"
    return None


def _sure_of(budget: ExpertBudget | None, wanted: int) -> int:
    """Experts that a row surely selects: of a shared set only its own best may be in reach."""
    if budget is None:
        return wanted
    return budget.k0 or 1 if budget.method is BudgetMethod.OEA else 1


def _groups(experts: Iterable[int], shape: ExpertShape) -> set[int]:
    size = shape.experts // shape.groups
    return {expert // size for expert in experts}


def _by_layer(named: Iterable[ExpertId]) -> Mapping[int, set[int]]:
    layers: defaultdict[int, set[int]] = defaultdict(set)
    for layer, expert in named:
        layers[layer].add(expert)
    return layers


def _too_few(message: str, param: str) -> RoutingError:
    return RoutingError(message, param=param, reason="too_few_experts")
