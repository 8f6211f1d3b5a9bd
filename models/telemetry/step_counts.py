"""What one step ran, as the worker tells the scheduler.

Not sums: a worker sends what its plan already knows, and the scheduler's process adds it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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
from sluice.models.telemetry.request_sums import ExpertSums


@dataclass(frozen=True, slots=True)
class StockStep:
    """A step that ran everything.

    Attributes:
        rows: token rows.
        generated: how many of them were generated.
    """

    rows: int
    generated: int


@dataclass(frozen=True, slots=True, eq=False)
class RequestStep:
    """What a routed request adds to its sums in a step, beside its segments.

    Attributes:
        request_id: vLLM's.
        index: in the batch.
        sampled: phase that a token was sampled in, or None.
        heads: rows that the LM head ran on, exit tests included.
        exit_layer: layer after which a new token under an exit rule left, or None.
        token: index of a token in the answer and the last layer that ran for it, if its request
            asked for a report.
        skipped: the mask that a prompt method has decided on, bool, (layers, 2 modules): once.
        experts: what the routers did for it, or None without expert controls.
    """

    request_id: str
    index: int
    sampled: int | None = None
    heads: int = 0
    exit_layer: int | None = None
    token: tuple[int, int] | None = None
    skipped: BoolArray | None = None
    experts: ExpertSums | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RoutedStepCounts:
    """A step with routed requests.

    Attributes:
        segments: int64, (segments, 6), fields of `sluice.models.depth.masks.Segment`, with the
            masks that their tokens ran.
        passes: requests in the batch and weak passes behind them.
        masks: masks that a segment names for the first time: `skip` and `fill` by row.
        requests: the routed ones.
    """

    segments: IntArray
    passes: int
    masks: Mapping[int, tuple[BoolArray, BoolArray]]
    requests: tuple[RequestStep, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WorkerCounts:
    """What a worker tells with an output.

    Attributes:
        steps: that have run since the last output.
        selections: of experts since it was last said, int64, (layers with experts, experts + 2),
            or None.
    """

    steps: tuple[StockStep | RoutedStepCounts, ...]
    selections: IntArray | None = None


def count_outcomes(
    segments: IntArray, requests: int, skip: BoolArray, fill: BoolArray
) -> tuple[IntArray, IntArray]:
    """What became of the tokens.

    Args:
        segments: as in `RoutedStepCounts`.
        requests: in the step, weak passes among them.
        skip: bool, (masks, layers, 2 modules).
        fill: bool, (masks, layers).

    Returns:
        outcomes: int64, (requests, 2 phases, layers, 2 modules, 3 outcomes), token rows.
        exits: int64, (requests, layers), generated rows by the last layer they ran anything in;
            a row that ran nothing at all counts for the first.
    """
    layers = skip.shape[1]
    # One pass over all segments: a step has as many as a batch has requests, and it waits for this.
    owners, phases, masks, lengths, pending, weak = segments.T
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
