"""What became of a step's tokens, counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sluice.models.depth.masks import Segment
from sluice.models.policy.axes import (
    ATTENTION,
    DECODE,
    EXECUTED,
    FILLED,
    MODULES,
    OUTCOMES,
    PHASES,
    SKIPPED,
    BoolArray,
    IntArray,
)


def count_outcomes(
    segments: Sequence[Segment], requests: int, skip: BoolArray, fill: BoolArray
) -> tuple[IntArray, IntArray]:
    """What became of the tokens; arguments as in `build_plan`.

    Returns:
        outcomes: int64, (requests, 2 phases, layers, 2 modules, 3 outcomes), token rows.
        exits: int64, (requests, layers), generated rows by the last layer they ran anything in;
            a row that ran nothing at all counts for the first.
    """
    layers = skip.shape[1]
    # One pass over all segments: a step has as many as a batch has requests, and it waits for this.
    columns = np.array(segments, dtype=np.int64).reshape(-1, len(Segment._fields)).T
    owners, phases, masks, lengths, pending, weak = columns
    skipped, fresh = skip[masks], pending == 0
    filled = fill[masks] & fresh[:, np.newaxis]
    each = np.zeros((len(owners), layers, len(MODULES), len(OUTCOMES)), np.int64)
    each[..., EXECUTED] = ~skipped
    # Lower layers of a pending row, and that it left, were counted when it ran them.
    each[..., SKIPPED] = skipped & fresh[:, np.newaxis, np.newaxis]
    each[:, :, ATTENTION, SKIPPED] -= filled
    each[:, :, ATTENTION, FILLED] = filled
    each *= lengths[:, np.newaxis, np.newaxis, np.newaxis]
    outcomes = np.zeros((requests, len(PHASES), *each.shape[1:]), np.int64)
    np.add.at(outcomes, (owners, phases), each)
    ran: BoolArray = np.any(~skipped, axis=2)
    last = np.where(ran.any(axis=1), layers - 1 - ran[:, ::-1].argmax(axis=1), 0)
    generated = fresh & (phases == DECODE) & (weak == 0)
    exits = np.zeros((requests, layers), np.int64)
    np.add.at(exits, (owners, last), lengths * generated)
    return outcomes, exits
