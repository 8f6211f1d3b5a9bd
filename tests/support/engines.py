"""Engines that told some counts, without any that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.inbox import Inbox
from sluice.server.telemetry.engines import Engines

LAYERS, EXPERTS = 3, 4
SHAPE = ExpertShape(layers=(0, 2), experts=EXPERTS, top_k=2)


@dataclass(frozen=True)
class ToldEngines:
    """What collectors read, and the inbox behind it."""

    engines: Engines
    inbox: Inbox

    @classmethod
    def started(cls, indices: Sequence[int], shape: ExpertShape | None = None) -> ToldEngines:
        engines, inbox = Engines(), Inbox()
        engines.attach(inbox, indices, LAYERS, shape)
        return cls(engines, inbox)

    def tell(self, engine: int, counts: Counts, *, new_window: bool = True) -> None:
        self.inbox.count(engine, counts, new_window=new_window)


def counts(
    layers: np.ndarray | None = None,
    exits: Sequence[int] = (0,) * LAYERS,
    selections: Mapping[int, Sequence[int]] | None = None,
) -> Counts:
    """Counts of one model with experts in two layers.

    Args:
        layers: (layers, 2 modules, 3 outcomes); None are zeros.
        exits: by layer.
        selections: by place among the layers with experts; the last two columns are extra.
    """
    zeros = Counts.zeros(LAYERS, len(SHAPE.layers), EXPERTS)
    selected = zeros.selections.copy()
    for place, row in (selections or {}).items():
        selected[place] = row
    return Counts(
        zeros.layers if layers is None else layers,
        np.array(exits),
        selected if selections else np.zeros((0, 2), dtype=np.int64),
    )
