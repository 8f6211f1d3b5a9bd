"""Exits that a method is worth testing with: after which layers, and at which threshold.

One threshold for all layers asks too much of the early ones: where a token's state after layer 10
says little, the rule fails, though it could be trusted after layer 27. So exits are also tried
after the last of the layers alone. What is tried is put in order, from safe to risky, by other
prompts than it is tested on: Pareto Testing (arXiv 2210.07913), which Learn-then-Test's fixed
sequence allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.offline.calibrate.depth.exit_grid import threshold_grid
from sluice.models.offline.hf_model.examples import spaced_indices

_SETS = 8
"""Sets of layers, at most: all of them, and the last ones of them."""
_FINENESS = 4
"""Thresholds of each set for one that is tested."""
_SAFER = (0.125, 0.25, 0.5)
"""Shares of the saving of the first candidate that are tested before it."""
_RISKIEST = 2.0
"""Times the tolerance: what looks worse than that on other prompts is not tested."""


@dataclass(frozen=True)
class Candidate:
    """One way to leave.

    Attributes:
        layers: after which tokens may leave, ascending.
        threshold: that they are held against.
        risk: share of tokens that leave with another token than full depth's, as estimated.
        depth: mean number of layers that a token runs, as estimated.
    """

    layers: tuple[int, ...]
    threshold: float
    risk: float
    depth: float


def exit_candidates(
    points: Tensor,
    right: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    full: int,
    count: int,
    tolerance: float,
    *,
    lower_is_stricter: bool,
) -> list[Candidate]:
    """Candidates in the order in which they are to be tested, each saving more than the last.

    Args:
        points: fp32, (exits, tokens), of `exit_grid.turning_points`.
        right: bool, (exits, tokens): whether full depth's token is the likeliest there.
        weights: fp32, (tokens,), mean 1.
        layers: of the exits, ascending.
        full: layers of the model.
        count: of candidates, at most; a few safer ones come before them.
        tolerance: of the risk.
        lower_is_stricter: as in `ExitMethod.leaves_below`.
    """
    every = []
    for start in sorted({*spaced_indices(_SETS - 1, len(layers)), 0, len(layers) - 1}):
        own, after = points[start:], tuple(layers[start:])
        for threshold in threshold_grid(own, after, full, _FINENESS * count, lower_is_stricter):
            leaves = own <= threshold if lower_is_stricter else own >= threshold
            outcome = _outcome(leaves, right[start:], after, full)
            risk, depth = (float((each * weights).mean()) for each in outcome)
            every.append(Candidate(after, threshold, risk, depth))
    best: list[Candidate] = []
    for each in sorted(every, key=lambda each: (each.risk, each.depth)):
        if not best or each.depth < best[-1].depth:
            best.append(each)
    tested = [each for each in best if each.risk <= _RISKIEST * tolerance] or best[:1]
    chosen = [tested[place] for place in spaced_indices(count, len(tested))]
    first = chosen[0]
    safe = [each for each in every if each.risk <= first.risk and each.depth < full]
    for share in reversed(_SAFER):
        deepest = full - share * (full - first.depth)
        if able := [each for each in safe if each.depth >= deepest]:
            # Of equals the one whose tokens leave later.
            safer = min(able, key=lambda each: (each.depth, -each.layers[0]))
            if safer not in chosen:
                chosen.insert(0, safer)
    return chosen


def _outcome(
    leaves: Tensor, right: Tensor, layers: Sequence[int], full: int
) -> tuple[Tensor, Tensor]:
    """Of each token, whether it leaves with another token than full depth's, and its layers.

    Args:
        leaves: bool, (exits, tokens).
        right: bool, (exits, tokens).
        layers: of the exits, ascending.
        full: layers of the model.
    """
    depth = torch.full(leaves.shape[1:], float(full), device=leaves.device)
    wrong = torch.zeros_like(depth)
    for place in reversed(range(len(layers))):
        depth[leaves[place]] = layers[place] + 1
        wrong[leaves[place]] = (~right[place][leaves[place]]).float()
    return wrong, depth
