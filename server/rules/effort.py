"""`routing.effort`: from a share of full depth to a skip set.

With a measured frontier, its levels are what an effort stands for; see `Profile.frontier`. Without
one nothing was measured, and an effort is the share of blocks that run. Either way smaller efforts
leave out what larger ones do and more, so the sets are nested; they are elastic, so that the rows
of a step may agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sluice.models.depth.order import Unit, drop_order, skip_first
from sluice.models.policy import Phase, SkipSet
from sluice.models.profile_fields import EffortLevel
from sluice.server.capabilities import Capabilities
from sluice.server.rules.checks import invalid
from sluice.server.rules.skip_set import check_something_runs

EFFORT = "routing.effort"

_SubLayer = tuple[Unit, int]


def effort_set(effort: float, phase: Phase, capabilities: Capabilities) -> SkipSet:
    """The sub-layers that an effort leaves out.

    Without levels: the first `floor((1 - effort) * layers + 1/2)` blocks of the drop order. With
    levels: see `_between`.

    Raises:
        RoutingError: nothing would be left to run, or nothing was measured that far down.
    """
    levels = capabilities.effort_levels
    if levels:
        left_out = _between(effort, levels, capabilities)
    else:
        count = math.floor((1.0 - effort) * capabilities.layers + 0.5)
        left_out = drop_order(Unit.BLOCK, capabilities.layers, capabilities.importance)[:count]
    if not left_out:
        return SkipSet()
    skip = skip_first(left_out, len(left_out), phase, elastic=True)
    check_something_runs(skip, capabilities, EFFORT)
    return skip


def _between(
    effort: float, levels: Sequence[EffortLevel], capabilities: Capabilities
) -> list[_SubLayer]:
    """What an effort leaves out between two neighbouring levels.

    Let A be the lowest level at or above the effort (full depth is one, of effort 1) and B the
    next, of efforts a and b, and n the number of sub-layers that B leaves out beyond A. All of A
    goes, and of the n the first `floor(n * (a - effort) / (a - b) + 1/2)` in joint drop order: each
    stands for an equal part of the way from a to b, and the set nearest the effort is taken. So a
    level's own effort is that level, and smaller efforts leave out no less.

    Raises:
        RoutingError: the effort lies below the lowest level.
    """
    order = drop_order(Unit.JOINT, capabilities.layers, capabilities.importance)
    fuller: frozenset[_SubLayer] = frozenset()
    above = 1.0
    for level in levels:
        own = _sub_layers(level)
        if effort >= level.effort:
            further = [unit for unit in order if unit in own - fuller]
            way = (above - effort) / (above - level.effort)
            return [*fuller, *further[: math.floor(len(further) * way + 0.5)]]
        fuller, above = own, level.effort
    raise invalid(f"{effort:g} is below {above:g}, the lowest effort that was measured", EFFORT)


def _sub_layers(level: EffortLevel) -> frozenset[_SubLayer]:
    attention = ((Unit.ATTENTION, layer) for layer in level.attention)
    return frozenset((*attention, *((Unit.MLP, layer) for layer in level.mlp)))
