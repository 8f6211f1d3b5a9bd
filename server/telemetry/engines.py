"""The engines behind this API server, for what shows their counts."""

from __future__ import annotations

from collections.abc import Iterable

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.engine_counters import EngineCounters, Reading
from sluice.models.telemetry.inbox import Inbox


class Engines:
    """Counters of the engines; none before they have started.

    Attributes:
        expert_layers: decoder layers that have routed experts, ascending.
    """

    def __init__(self) -> None:
        self._inbox: Inbox | None = None
        self.expert_layers: tuple[int, ...] = ()

    def attach(
        self, inbox: Inbox, indices: Iterable[int], num_layers: int, shape: ExpertShape | None
    ) -> None:
        """Show what arrives from now on; every series is there from zero.

        Args:
            inbox: where engines tell what they counted.
            indices: vLLM's, of the engines.
            num_layers: of the model.
            shape: of its routed experts, if they are counted.
        """
        self.expert_layers = () if shape is None else shape.layers
        experts = (0, 0) if shape is None else (len(shape.layers), shape.experts)
        for index in indices:
            zeros = Counts.zeros(num_layers, *experts)
            inbox.engines.setdefault(index, EngineCounters(zeros))
        self._inbox = inbox

    def read(self) -> dict[int, Reading]:
        """What each engine has counted, by vLLM's index."""
        engines = {} if self._inbox is None else self._inbox.engines
        return {index: engines[index].read() for index in sorted(engines)}
